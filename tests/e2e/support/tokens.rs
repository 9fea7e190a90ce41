//! Files of tokens.

use tempfile::TempDir;

use super::server::kvs;

/// A file of tokens, and the tokens themselves.
pub struct Tokens {
    directory: TempDir,
}

impl Tokens {
    pub fn new() -> Self {
        Self { directory: TempDir::new().expect("a temporary directory can be made") }
    }

    pub fn file(&self) -> String {
        self.directory.path().join("tokens").to_str().expect("a temporary path is text").to_owned()
    }

    /// Makes one as an operator would.
    pub fn add(&self, args: &[&str]) -> String {
        let mut command = kvs();
        command.args(["token", "create", "--tokens", &self.file()]).args(args);
        let output = command.stdout(std::process::Stdio::piped()).output().expect("the binary can be started");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("a token is text").trim().to_owned()
    }
}
