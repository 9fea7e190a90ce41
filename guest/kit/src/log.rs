//! Log lines with a level, of the host's log; `println!` has the level INFO. In a native test nothing is written.

use std::fmt::Display;

use crate::bindings::kvs::store::logging::{self, Level};
use crate::bindings::kvs::store::request_context;
use crate::testing;

pub fn error(message: impl Display) {
    log(Level::Error, message);
}

pub fn warn(message: impl Display) {
    log(Level::Warn, message);
}

pub fn info(message: impl Display) {
    log(Level::Info, message);
}

pub fn debug(message: impl Display) {
    log(Level::Debug, message);
}

pub fn trace(message: impl Display) {
    log(Level::Trace, message);
}

fn log(level: Level, message: impl Display) {
    if cfg!(target_arch = "wasm32") {
        logging::log(level, &message.to_string());
    }
}

/// Identifier of the request in `handle`, which the client and all log lines of the call have.
pub fn request_id() -> Option<String> {
    if cfg!(target_arch = "wasm32") { request_context::request_id() } else { testing::request_id() }
}
