//! Small file systems, mounted for a test, and directories mounted at another path.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use super::load::SMALL_SEGMENTS;
use super::server::{Server, serve, through};

/// Temporary file system.
pub struct Mount {
    pub directory: TempDir,
}

impl Mount {
    const SIZE: u64 = 24 << 20;

    /// tmpfs.
    pub fn tmpfs() -> Self {
        Self::of(&["-t", "tmpfs", "-o", &format!("size={}", Self::SIZE), "none"])
    }

    /// ext4 in a file.
    pub fn ext4() -> Self {
        let image = tempfile::NamedTempFile::new().expect("a temporary file can be made");
        image.as_file().set_len(Self::SIZE).expect("a file can be made longer");
        let path = image.path().to_str().expect("a temporary path is text");
        // No blocks reserved for root, which runs this.
        run("mkfs.ext4", &["-q", "-m", "0", path]);
        Self::of(&["-o", "loop", path])
    }

    fn of(what: &[&str]) -> Self {
        let directory = TempDir::new().expect("a temporary directory can be made");
        let path = directory.path().to_str().expect("a temporary path is text").to_owned();
        run("mount", &[what, &[&path]].concat());
        Self { directory }
    }

    /// The same files at another place, where they cannot be written.
    pub fn read_only(&self) -> Self {
        let path = self.directory.path().to_str().expect("a temporary path is text");
        let other = Self::of(&["--bind", path]);
        other.remount("bind,ro");
        other
    }

    pub fn data(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    pub fn remount(&self, option: &str) {
        let path = self.directory.path().to_str().expect("a temporary path is text");
        run("mount", &["-o", &format!("remount,{option}"), path]);
    }

    /// Allocates this amount of space, until the file is removed.
    pub fn filler(&self, bytes: u64) -> PathBuf {
        let path = self.directory.path().join("filler");
        let zeros = vec![0; usize::try_from(bytes).expect("it is not much")];
        fs::write(&path, zeros).expect("there is room so far");
        File::open(&path).and_then(|file| file.sync_all()).expect("there is room so far");
        path
    }

    /// Allocates all remaining space, until the file is removed.
    pub fn brim(&self) -> PathBuf {
        let path = self.directory.path().join("brim");
        let mut file = File::create(&path).expect("a file can be empty");
        for size in [1 << 20, 4096, 1] {
            while file.write_all(&vec![0; size]).is_ok() {}
        }
        path
    }

    pub fn serve(&self) -> Server {
        let mut command = serve(&self.data());
        command.args(SMALL_SEGMENTS);
        // The directory that is removed with the server is another.
        Server::spawn(command, TempDir::new().expect("a temporary directory can be made"))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let path = self.directory.path();
        let unmounted = Command::new("umount").arg(path).status();
        if !unmounted.is_ok_and(|status| status.success()) {
            eprintln!("{} stays mounted", path.display());
        }
    }
}

/// The same command in a mount namespace of its own, where `directory` is also at `path`, as a volume in a container.
pub fn in_container(directory: &Path, path: &Path, command: &Command) -> Command {
    const SCRIPT: &str = r#"mount --bind "$1" "$2" && shift 2 && exec "$@""#;
    let mut other = through("unshare", command);
    other.args(["--mount", "sh", "-c", SCRIPT, "sh"]).arg(directory).arg(path);
    other.arg(command.get_program()).args(command.get_args());
    other
}

fn run(program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).output();
    let output = output.unwrap_or_else(|error| panic!("this test needs {program}: {error}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "this test mounts a file system, for which it must be root: {program}: {said}");
}
