//! The report of a trap: its cause, the functions of the guest, and the last lines that the call printed.

use wasmtime::{Trap, WasmBacktrace};

use super::limits::CpuLimit;

/// Maximum number of functions in a report.
const MAX_FUNCTIONS: usize = 10;
/// Maximum number of printed lines in a report.
const MAX_LINES: usize = 4;
/// Maximum number of bytes of them.
const PRINTED_BYTES: usize = 1 << 10;
/// Text between the cause and the printed lines.
const PRINTED: &str = "; it printed: ";

/// Beginnings of the functions between the code that fails and the trap, in Rust's standard library.
const MACHINERY: [&str; 13] = [
    "__rust_",
    "__rustc",
    "abort",
    "alloc::alloc::handle_alloc_error",
    "alloc::raw_vec::handle_error",
    "core::option::expect_failed",
    "core::option::unwrap_failed",
    "core::panicking::",
    "core::result::unwrap_failed",
    "core::slice::index::slice_",
    "rust_",
    "std::",
    "panic_abort::",
];

/// The guest trapped, or exceeded a limit: its memory can be in any state, and the instance must not be called again.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Trapped(String);

impl Trapped {
    /// Reports in one line what happened, in which functions, and what the guest printed.
    pub fn new(error: &wasmtime::Error, limit: CpuLimit, printed: &[u8]) -> Self {
        let mut report = match error.downcast_ref::<Trap>() {
            Some(Trap::Interrupt) => format!("the call took longer than {:?} ({})", limit.time, limit.flag),
            _ => error.root_cause().to_string(),
        };
        let frames = error.downcast_ref::<WasmBacktrace>().map(WasmBacktrace::frames).unwrap_or_default();
        let names = frames.iter().filter_map(|frame| frame.func_name());
        // Without the hash that Rust adds; names of other languages stay as they are.
        let names = names.map(|name| format!("{:#}", rustc_demangle::demangle(name)));
        let functions: Vec<_> = names.skip_while(|name| is_machinery(name)).take(MAX_FUNCTIONS).collect();
        if !functions.is_empty() {
            report += &format!(", in {}", functions.join(" < "));
        }
        let printed = last_lines(printed);
        if !printed.is_empty() {
            report += &format!("{PRINTED}{printed}");
        }
        Self(report)
    }
}

/// The end of what a call printed, whether or not it was logged.
#[derive(Default)]
pub struct Printed(Vec<u8>);

impl Printed {
    pub fn add(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
        if self.0.len() > 2 * PRINTED_BYTES {
            self.0.drain(..self.0.len() - PRINTED_BYTES);
        }
    }

    pub fn clear(&mut self) {
        self.0.clear();
    }

    pub fn bytes(&self) -> &[u8] {
        &self.0[self.0.len().saturating_sub(PRINTED_BYTES)..]
    }
}

/// Returns a report without what the guest printed, which can be data.
pub fn without_printed(report: &str) -> &str {
    report.split(PRINTED).next().unwrap_or_default()
}

fn is_machinery(function: &str) -> bool {
    let function = function.trim_start_matches('<');
    MACHINERY.iter().any(|beginning| function.starts_with(beginning))
}

/// Returns the last printed lines as one, escaped like each of them.
fn last_lines(printed: &[u8]) -> String {
    let printed = String::from_utf8_lossy(printed);
    let lines: Vec<_> = printed.lines().filter_map(printable).collect();
    lines[lines.len().saturating_sub(MAX_LINES)..].join(" | ")
}

/// Returns a printed line as log lines have it: escaped, so that a guest cannot move the cursor or forge a line of another, but
/// for quotes. None for one that says nothing: a blank one, or the advice that Rust adds to a panic, which applies to nobody here.
pub fn printable(line: &str) -> Option<String> {
    let line = line.trim_end();
    let says_something = !line.is_empty() && !line.starts_with("note: run with `RUST_BACKTRACE");
    // A backslash of the guest is escaped too, so that each of these is one that was added before a quote.
    says_something.then(|| line.escape_debug().to_string().replace("\\'", "'").replace("\\\"", "\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_of_the_panic_machinery_are_recognized() {
        for function in ["std::panicking::panic_with_hook", "__rustc::rust_panic", "<std::io::Stderr as X>::y", "abort"]
        {
            assert!(is_machinery(function), "{function}");
        }
        for function in ["kvs_guest::store::Store::put", "<kvs_guest::Store as X>::y", "main", "alloc::vec::Vec::push"]
        {
            assert!(!is_machinery(function), "{function}");
        }
    }

    #[test]
    fn printed_bytes_are_bounded() {
        let mut printed = Printed::default();
        for n in 0..10_000 {
            printed.add(format!("{n:04}").as_bytes());
            assert!(printed.0.len() <= 2 * PRINTED_BYTES);
        }
        assert_eq!(printed.bytes().len(), PRINTED_BYTES);
        assert!(printed.bytes().ends_with(b"99989999"));
        printed.clear();
        assert_eq!(printed.bytes(), b"");
    }

    #[test]
    fn last_lines_are_escaped_and_bounded() {
        let printed =
            b"1\n2\n\n3\nthread panicked at a.rs:1:\nit \x1b[2J\xff\r\nnote: run with `RUST_BACKTRACE=1` to\n";
        assert_eq!(last_lines(printed), "2 | 3 | thread panicked at a.rs:1: | it \\u{1b}[2J\u{fffd}");
        assert_eq!(last_lines(b""), "");
        assert_eq!(last_lines(b"thread 'a' said \"b\\'\""), "thread 'a' said \"b\\\\'\"");
        assert_eq!(without_printed("a, in b; it printed: c; it printed: d"), "a, in b");
        assert_eq!(without_printed("a, in b"), "a, in b");
    }
}
