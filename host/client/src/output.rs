//! Output of commands: text for people, or a line of JSON for programs.

use std::io::{self, Write};

use serde_json::Value;

/// Format of the output of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    Text,
    /// An object per line.
    Json,
}

impl Output {
    /// Prints a result: its line of text, if it has any, or its object.
    pub fn print(self, text: Option<&str>, object: impl FnOnce() -> Value, out: &mut dyn Write) -> io::Result<()> {
        match (self, text) {
            (Self::Json, _) => writeln!(out, "{}", object()),
            (Self::Text, Some(text)) => writeln!(out, "{text}"),
            (Self::Text, None) => Ok(()),
        }
    }
}
