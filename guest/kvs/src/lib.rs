//! The default guest: an ordered map behind the REST interface, version 1; and the base of guests that extend it.
//!
//! Owns: which part responds to requests, and which holds the state. Must never know: what a request means (`rest`), what a key
//! is (`key`), or how entries become state (`store`). Those are plain functions of their arguments, so that they run and are
//! tested natively, without a host.

pub mod content_type;
pub mod grant;
pub mod item;
mod list;
mod many;
mod modify;
pub mod number;
mod operation;
mod order;
pub mod own;
mod prefix;
mod range;
pub mod rest;
pub mod store;
mod table;
#[cfg(test)]
mod testing;
mod transaction;
mod unkept;
mod value;
mod watch;
mod write;

use kvs_kit::bindings::kvs;
use kvs_kit::guest::Guest;
use kvs_kit::sharding::{KeyInPath, Sharding};
use kvs_kit::state::Logged;
use kvs_kit::{Request, Response, Target, answer, conditions, duration, key, query, text};

pub use crate::rest::{HEADERS, respond};
pub use crate::store::Store;

/// The default store.
pub struct Kvs;

impl Guest for Kvs {
    type State = Store;

    const NAME: &'static str = "kvs";
    const HEADERS: &'static [&'static str] = &HEADERS;
    const CAPABILITIES: &'static [&'static str] = &["key-prefix"];

    fn handle(store: &mut Logged<'_, Store>, request: Request) -> answer::Result {
        Ok(respond(store, request))
    }
}

impl Sharding for Kvs {
    type Base = KeyInPath;

    fn route(method: &str, target: &str) -> Target {
        rest::route(method, target)
    }

    fn extract_keys(body: &[u8]) -> Vec<String> {
        transaction::keys(body)
    }

    fn merge_responses(request: &Request, responses: Vec<Response>) -> Response {
        rest::merge(request, responses)
    }
}
