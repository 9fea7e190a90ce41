//! Images: built by buildah from the Dockerfile, and run as they say of themselves.
//!
//! Owns: where images are kept, `target/image`, and the base of the build. Must never know: what kvs does.

use std::fs::{self, Metadata};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, OnceLock, PoisonError};

use serde_json::Value;

/// The image with this machine's toolchain, without registry in its name: it is nowhere else.
const BASE: &str = "localhost/kvs-toolchain";

/// One build at a time: they share a store, and the cores.
static BUILDING: Mutex<()> = Mutex::new(());

pub struct Image {
    flavour: &'static str,
    name: String,
    /// Where its file system is mounted.
    root: PathBuf,
}

impl Image {
    pub fn build(flavour: &'static str) -> Self {
        Self::build_with(flavour, &[])
    }

    /// Without what was kept of earlier builds but cargo's own.
    pub fn rebuild(flavour: &'static str) -> Self {
        Self::build_with(flavour, &["--no-cache"])
    }

    fn build_with(flavour: &'static str, more: &[&str]) -> Self {
        let _alone = BUILDING.lock().unwrap_or_else(PoisonError::into_inner);
        static ONCE: OnceLock<()> = OnceLock::new();
        ONCE.get_or_init(make_base);
        let name = format!("localhost/kvs-{flavour}");
        let mut build = buildah(&["build", "--isolation", "chroot", "--layers", "--format", "docker", "--pull-never"]);
        build.args(["--timestamp", "0", "--build-arg", &format!("RUST={BASE}"), "--target", flavour, "--tag", &name]);
        build.args(["--build-arg", "VERSION=0.0.0", "--build-arg", "REVISION=test"]).args(more);
        for (from, to) in shared() {
            build.arg("--volume").arg(format!("{}:{}", from.display(), to.display()));
        }
        run(build.arg(workspace()));
        let container = printed(&mut buildah(&["from", "--pull-never", &name]));
        let root = PathBuf::from(printed(&mut buildah(&["mount", &container])));
        Self { flavour, name, root }
    }

    pub fn flavour(&self) -> &str {
        self.flavour
    }

    /// The digests of its layers. Its own digest is another each time: buildah notes the container it worked in.
    pub fn layers(&self) -> Value {
        self.inspected()["rootfs"]["diff_ids"].clone()
    }

    /// What it says of itself.
    pub fn config(&self) -> Value {
        self.inspected()["config"].clone()
    }

    fn inspected(&self) -> Value {
        let inspected = printed(&mut buildah(&["inspect", "--type", "image", &self.name]));
        let inspected: Value = serde_json::from_str(&inspected).expect("buildah writes JSON");
        inspected["Docker"].clone()
    }

    pub fn binary(&self) -> PathBuf {
        self.root.join("kvs")
    }

    /// All there is in it.
    pub fn files(&self) -> Vec<(String, Metadata)> {
        let mut files = Vec::new();
        let mut directories = vec![self.root.clone()];
        while let Some(directory) = directories.pop() {
            for entry in fs::read_dir(directory).expect("the image can be read") {
                let path = entry.expect("the image can be read").path();
                let metadata = fs::symlink_metadata(&path).expect("the image can be read");
                let name =
                    path.strip_prefix(&self.root).expect("it is in the image").to_str().expect("text").to_owned();
                if metadata.is_dir() {
                    directories.push(path);
                }
                files.push((name, metadata));
            }
        }
        files
    }

    /// Its command, with these arguments beside.
    pub fn run(&self, volume: &Path, args: &[&str]) -> Command {
        let command = self.config()["Cmd"].clone();
        let command: Vec<_> =
            command.as_array().expect("it has one").iter().map(|arg| arg.as_str().expect("text")).collect();
        self.exec(volume, &[&command[..], args].concat())
    }

    /// Its entry point with these arguments: with its environment and its user, `volume` at /data, and all else read-only.
    pub fn exec(&self, volume: &Path, args: &[&str]) -> Command {
        const SCRIPT: &str = r#"
            mount --bind "$1" "$1" && mount --bind "$2" "$1/data" && mount -o remount,ro,bind "$1" && shift 2 || exit 99
            exec "$@""#;
        let config = self.config();
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", SCRIPT, "sh"]).arg(&self.root).arg(volume).arg("chroot");
        let user = config["User"].as_str().expect("it has one");
        command
            .arg(format!("--userspec={user}"))
            .arg(&self.root)
            .arg(config["Entrypoint"][0].as_str().expect("it has one"));
        command.args(args).env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        for variable in config["Env"].as_array().expect("it has one") {
            let (name, value) = variable.as_str().and_then(|variable| variable.split_once('=')).expect("NAME=VALUE");
            command.env(name, value);
        }
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command
    }
}

/// What the build finds of this machine, and where: the system, the toolchain, and what cargo has built already.
fn shared() -> Vec<(PathBuf, PathBuf)> {
    let target = workspace().join("target");
    let mut shared: Vec<_> = [PathBuf::from("/usr"), home("CARGO_HOME", ".cargo"), home("RUSTUP_HOME", ".rustup")]
        .into_iter()
        .map(|path| (path.clone(), path))
        .collect();
    shared.push((target, "/src/target".into()));
    shared
}

/// Where a tool keeps its files on this machine.
pub fn home(variable: &str, default: &str) -> PathBuf {
    let home = || PathBuf::from(std::env::var_os("HOME").expect("there is a home")).join(default);
    std::env::var_os(variable).map_or_else(home, PathBuf::from)
}

fn workspace() -> &'static Path {
    Path::new(kvs_tests::ROOT)
}

/// An image that has of this machine what is not shared with the build.
fn make_base() {
    let container = printed(&mut buildah(&["from", "scratch"]));
    let root = PathBuf::from(printed(&mut buildah(&["mount", &container])));
    for name in ["bin", "lib", "lib64", "sbin"] {
        symlink(format!("usr/{name}"), root.join(name)).expect("the image takes a link");
    }
    for directory in ["etc", "tmp", "usr", "src/target"] {
        fs::create_dir_all(root.join(directory)).expect("the image takes a directory");
    }
    for name in ["alternatives", "group", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "passwd", "ssl"] {
        run(Command::new("cp").arg("-a").arg(Path::new("/etc").join(name)).arg(root.join("etc")));
    }
    let path = std::env::var("PATH").expect("there is a path");
    let mut config = buildah(&["config", "--env", &format!("PATH={path}")]);
    for (name, default) in [("CARGO_HOME", ".cargo"), ("RUSTUP_HOME", ".rustup")] {
        config.arg("--env").arg(format!("{name}={}", home(name, default).display()));
    }
    run(config.arg(&container));
    run(&mut buildah(&["commit", "--rm", "--quiet", "--timestamp", "0", &container, BASE]));
}

/// buildah, with a store of its own that needs nothing of the kernel.
fn buildah(args: &[&str]) -> Command {
    let store = workspace().join("target/image");
    fs::create_dir_all(&store).expect("target can be written");
    let mut command = Command::new("buildah");
    command.arg("--root").arg(store.join("store")).arg("--runroot").arg(store.join("run"));
    command.args(["--storage-driver", "vfs"]).args(args);
    command
}

fn run(command: &mut Command) {
    let status = command.status().unwrap_or_else(|error| panic!("{command:?}: {error}; `just image-test` installs it"));
    assert!(status.success(), "{command:?}: {status}");
}

fn printed(command: &mut Command) -> String {
    let output = command.stderr(Stdio::inherit()).output();
    let output = output.unwrap_or_else(|error| panic!("{command:?}: {error}; `just image-test` installs it"));
    assert!(output.status.success(), "{command:?}: {}", output.status);
    String::from_utf8(output.stdout).expect("text").trim().to_owned()
}
