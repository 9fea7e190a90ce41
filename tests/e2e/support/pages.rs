//! Console sessions of README.md and the book.
//!
//! A session is all `console` blocks of a page. A line after `$ ` is a command, which continues on the next line while a quote
//! is open; the lines after it are its output, with `…` for anything. A block of a language and a file, as in `python kvs.py`, is
//! what the reader writes to the file.

use std::net::SocketAddr;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Stdio;

use kvs_tests::{ROOT, binary};

use super::server::{Server, kvs, through};

/// Separates the outputs of commands.
const END: &str = "-- end of the output of a command --";

const END_OF_FILE: &str = "end of the file";

/// The address of the server, as the pages have it.
const LISTEN: &str = "127.0.0.1:8080";

/// Returns the file of a block.
fn file(fence: &str) -> Option<&str> {
    fence.split_once(' ').map(|(_, file)| file)
}

/// Returns the commands of a page and their expected outputs.
fn session(page: &str) -> Vec<(String, String)> {
    let (mut all, mut fence) = (Vec::<(String, String)>::new(), None::<&str>);
    for line in page.lines() {
        let file = fence.and_then(file);
        if let Some(language) = line.strip_prefix("```") {
            if let (Some(_), Some((command, _))) = (file, all.last_mut()) {
                *command += &format!("{END_OF_FILE}\n");
            }
            fence = if fence.is_some() { None } else { Some(language) };
            if let Some(file) = fence.and_then(self::file) {
                all.push((format!("cat > {file} <<'{END_OF_FILE}'\n"), String::new()));
            }
            continue;
        }
        if let (Some(_), Some((command, _))) = (file, all.last_mut()) {
            *command += &format!("{line}\n");
            continue;
        }
        if fence != Some("console") {
            continue;
        }
        match (line.strip_prefix("$ "), all.last_mut()) {
            (Some(command), _) => all.push((format!("{command}\n"), String::new())),
            (None, Some((command, output))) => {
                let is_open = command.matches('\'').count() % 2 == 1;
                let part = if is_open { command } else { output };
                *part += &format!("{line}\n");
            }
            (None, None) => panic!("a session begins with a command, not with {line:?}"),
        }
    }
    all
}

/// Checks an output. `…` matches anything, line ends included.
fn is_like(output: &str, expected: &str) -> bool {
    /// Checks what follows a `…`.
    fn ends_like(output: &str, expected: &str) -> bool {
        match expected.split_once('…') {
            None => output.ends_with(expected),
            Some((part, rest)) => output.find(part).is_some_and(|at| ends_like(&output[at + part.len()..], rest)),
        }
    }
    match expected.split_once('…') {
        None => output == expected,
        Some((part, rest)) => output.strip_prefix(part).is_some_and(|output| ends_like(output, rest)),
    }
}

/// Tools of npm, which `just` installs.
const NODE_MODULES: &str = "tests/clients/node_modules";

/// Runs the session of a page in a directory, on a server of its own.
pub fn run_in(page: &str, here: &Path) {
    let server = Server::start(&[]);
    run_on(page, here, &server, server.address());
}

/// Runs the session of a page in a directory, on a server that clients reach at this address.
pub fn run_on(page: &str, here: &Path, server: &Server, address: SocketAddr) {
    let path = Path::new(ROOT).join(page);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{page}: {error}"));
    let session = session(&text);
    assert!(!session.is_empty(), "{page} has no console session");
    if text.contains("npx ") {
        let modules = Path::new(ROOT).join(NODE_MODULES);
        assert!(modules.exists(), "{NODE_MODULES} is missing: `just test` installs it");
        symlink(modules, here.join("node_modules")).expect("the directory takes a link");
    }
    let mut script = "exec 2>&1; curl() { command curl --silent --max-time 60 --noproxy '*' \"$@\"; }\n".to_owned();
    for (command, _) in &session {
        script += &format!("{command}echo '{END}'\n");
    }
    let binaries = Path::new(binary()).parent().expect("the binary is in a directory").display();
    let output = through("bash", &kvs())
        .arg("-c")
        .arg(script.replace(LISTEN, &address.to_string()))
        .env("PATH", format!("{binaries}:{}", std::env::var("PATH").expect("PATH is set")))
        .env("KVS_URL", server.url(""))
        .env("KVS_ADMIN", server.admin().to_string())
        .current_dir(here)
        .stdout(Stdio::piped())
        .output()
        .expect("bash is installed");
    let stdout = String::from_utf8_lossy(&output.stdout).replace('\r', "");
    let mut outputs = stdout.split(END);
    for (command, expected) in &session {
        let output = outputs.next().unwrap_or_default().trim_start_matches('\n').trim_end();
        assert!(is_like(output, expected.trim_end()), "{page}: $ {command}printed\n{output}\nin place of\n{expected}");
    }
}
