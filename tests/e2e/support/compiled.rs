//! Compiled guests for the servers that tests start. Nearly all the CPU time of a start goes into compiling the guest: each is
//! compiled once per run, and is put into the cache of a new data directory, where a server finds what it compiled before.
//!
//! Compiling itself is tested by servers that are started in other ways, by swaps, and by `hosting::compiled`.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, LazyLock, Mutex, OnceLock};

use kvs_tests::{DEFAULT_GUEST, succeeds, target_dir};
use rustix::process::Signal;
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use super::server::{Process, kvs};

/// What follows the digest in the names of files in a cache: it stands for the settings of the engine.
static SUFFIX: LazyLock<String> = LazyLock::new(|| {
    let data = TempDir::new().expect("a temporary directory can be made");
    let mut command = kvs();
    command.args(["serve", "--listen", "127.0.0.1:0", "--data-dir"]).arg(data.path());
    let mut process = Process::spawn(command);
    let serving = process.stderr.find(|line| line.contains("serving on").then_some(()));
    serving.unwrap_or_else(|said| panic!("it ended without serving; it said:\n{said}"));
    process.signal(Signal::TERM);
    process.wait();
    let mut files = fs::read_dir(data.path().join("cache")).expect("there is a cache");
    let file = files.next().expect("the built-in guest is kept").expect("it can be listed").file_name();
    let name = file.to_str().expect("the name is text");
    name.strip_prefix(&digest(Path::new(DEFAULT_GUEST))).expect("it is named for the built-in guest").to_owned()
});

fn digest(component: &Path) -> String {
    let bytes = fs::read(component).expect("the guest is built");
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A compiled component, once the first that needs it has compiled it.
type Once = Arc<OnceLock<Arc<Vec<u8>>>>;

/// The component of a file, compiled for this machine once per run.
pub fn compiled(component: &Path) -> Arc<Vec<u8>> {
    static COMPILED: Mutex<Option<HashMap<String, Once>>> = Mutex::new(None);
    let mut all = COMPILED.lock().expect("no thread panics while it holds it");
    let one = Arc::clone(all.get_or_insert_default().entry(digest(component)).or_default());
    drop(all);
    let compile = || {
        let directory = TempDir::new().expect("a temporary directory can be made");
        let output = directory.path().join("guest.cwasm");
        let mut compile = kvs();
        compile.args(["compile", "--native", "--output"]).arg(&output).arg(component);
        succeeds(compile, &component.display().to_string());
        Arc::new(fs::read(&output).expect("it is written"))
    };
    Arc::clone(one.get_or_init(compile))
}

/// Puts a compiled guest into the cache of a data directory, as a server does.
pub fn cache(component: &Path, data: &Path) {
    let cache = data.join("cache");
    // Made already by a server, or refused by a directory that takes no files, as some tests have.
    let _ = DirBuilder::new().mode(0o700).create(&cache);
    let file = cache.join(format!("{}{}", digest(component), *SUFFIX));
    if cache.exists() && !file.exists() {
        let file = File::options().write(true).create_new(true).mode(0o600).open(file);
        file.and_then(|mut file| file.write_all(&compiled(component))).expect("the cache takes a file");
    }
}

/// Prepares the new data directory of a `kvs serve`: its guest need not be compiled if it is one of those built for the tests. What
/// starts it in other ways may give it another user, who cannot read the cache.
pub fn prepare(command: &Command) {
    if command.get_program() != kvs_tests::binary() {
        return;
    }
    let data = command.get_envs().find(|(name, _)| *name == "KVS_DATA_DIR");
    let Some(data) = data.and_then(|(_, value)| value).map(Path::new) else { return };
    if !data.is_dir() || data.join("cache").exists() || !command.get_args().any(|arg| arg == "serve") {
        return;
    }
    let is_guest = |arg: &&OsStr| Path::new(arg).extension().is_some_and(|end| end == "wasm" || end == "cwasm");
    let guest = command.get_args().find(is_guest).map_or(Path::new(DEFAULT_GUEST), Path::new);
    if guest.starts_with(target_dir()) && guest.extension().is_some_and(|end| end == "wasm") {
        cache(guest, data);
    }
}
