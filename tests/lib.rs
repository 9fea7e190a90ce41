//! Paths that the suites share: the project, the binary under test, the built-in guest.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::SystemTime;
use std::{env, fs};

/// The root of the project.
pub const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// The component of the built-in guest.
pub const DEFAULT_GUEST: &str = kvs::guest::BUILT_IN_FILE;

/// The binary under test, built beside this program. Fails when it is missing or older than its sources: cargo builds a
/// binary only together with tests of its own package.
pub fn binary() -> &'static str {
    static BINARY: OnceLock<String> = OnceLock::new();
    BINARY.get_or_init(|| {
        let program = env::current_exe().expect("this program has a path");
        let directory = program.ancestors().nth(2).expect("it is in deps of the target directory");
        let binary = directory.join("kvs");
        let advice = "build it with: cargo build --release --package kvs";
        let built = modified(&binary).unwrap_or_else(|| panic!("{} is missing; {advice}", binary.display()));
        for sources in [
            "host/src",
            "host/txlog/src",
            "host/client/src",
            "host/metrics/src",
            "host/runtime/src",
            "guest/kvs/src",
            "wit",
        ] {
            if let Some(newer) = newer_than(built, Path::new(&format!("{ROOT}/{sources}"))) {
                panic!("{} is older than {}; {advice}", binary.display(), newer.display());
            }
        }
        binary.into_os_string().into_string().expect("the path is text")
    })
}

fn modified(path: &Path) -> Option<SystemTime> {
    fs::metadata(path).and_then(|metadata| metadata.modified()).ok()
}

fn newer_than(time: SystemTime, directory: &Path) -> Option<PathBuf> {
    let entries = fs::read_dir(directory).expect("the sources can be listed");
    entries.map(|entry| entry.expect("it can be read").path()).find_map(|path| {
        if path.is_dir() { newer_than(time, &path) } else { modified(&path).filter(|at| *at > time).map(|_| path) }
    })
}
