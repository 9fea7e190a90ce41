//! The default guest: an ordered map behind the REST interface, version 1.
//!
//! Owns: the component, that is one [`Store`](store::Store), and which call of the contract goes to which part.
//! Must never know: what a request means (`rest`), what a key is (`key`), or how entries become state (`store`). Those
//! are plain functions of their arguments, so that they run and are tested natively, without a host.

pub mod allocator;
pub mod answer;
pub mod conditions;
pub mod content_type;
mod duration;
pub mod grant;
pub mod item;
pub mod key;
mod list;
mod many;
mod modify;
mod number;
mod operation;
mod order;
mod percent;
mod prefix;
pub mod query;
mod range;
pub mod rest;
pub mod store;
mod table;
#[cfg(test)]
mod testing;
mod text;
mod transaction;
mod unkept;
mod value;
mod watch;
mod write;

use std::cell::RefCell;

use exports::kvs::store::lifecycle::{Batch, Description, Statistics};
use exports::kvs::store::sharding::Target;
use exports::kvs::store::{handler, lifecycle, sharding};
use kvs::store::http::{Request, Response};
use kvs::store::response_cache::reuse;
use kvs::store::transaction_log::{AppendError, Event, append};
use kvs::store::watch::{Selector, subscribe, wait_for_change};

wit_bindgen::generate!({
    path: "../../wit",
    world: "sharded-store",
    generate_all,
    // What is exported is said by the component: `guest/default`, or a guest that builds on this one.
    pub_export_macro: true,
    // For the tests, which compare what was answered and appended.
    additional_derives: [PartialEq],
});

thread_local! {
    /// No two calls overlap, so a borrow of this never meets another.
    pub static STORE: RefCell<store::Store> = RefCell::default();
}

/// What the host offers.
pub struct Imports;

impl answer::Host for Imports {
    fn append(&mut self, events: &[Event]) -> Result<u64, AppendError> {
        append(events)
    }

    fn subscribe(&mut self, selectors: &[Selector], after: Option<&str>, puts_only: bool) {
        subscribe(selectors, after, puts_only);
    }

    fn wait_for_change(&mut self, key: &str, timeout_ms: u64) {
        wait_for_change(key, timeout_ms);
    }

    fn reuse(&mut self, key: &str, until_ms: Option<u64>) {
        reuse(&[key.to_owned()], until_ms);
    }
}

/// What the host instantiates.
pub struct Component;

/// For a guest that answers some requests in its own way and is the default store otherwise: what its `lifecycle` has beside
/// `describe`.
#[macro_export]
macro_rules! default_lifecycle {
    () => {
        fn apply(batch: $crate::exports::kvs::store::lifecycle::Batch) {
            <$crate::Component as $crate::exports::kvs::store::lifecycle::Guest>::apply(batch);
        }

        fn tick(now_ms: u64) -> Option<u64> {
            <$crate::Component as $crate::exports::kvs::store::lifecycle::Guest>::tick(now_ms)
        }

        fn stats() -> $crate::exports::kvs::store::lifecycle::Statistics {
            <$crate::Component as $crate::exports::kvs::store::lifecycle::Guest>::stats()
        }
    };
}

/// For the same guests: all of `sharding`.
#[macro_export]
macro_rules! default_sharding {
    () => {
        fn route(method: String, target: String) -> $crate::exports::kvs::store::sharding::Target {
            <$crate::Component as $crate::exports::kvs::store::sharding::Guest>::route(method, target)
        }

        fn extract_keys(body: Vec<u8>) -> Vec<String> {
            <$crate::Component as $crate::exports::kvs::store::sharding::Guest>::extract_keys(body)
        }

        fn merge_responses(
            request: $crate::kvs::store::http::Request,
            responses: Vec<$crate::kvs::store::http::Response>,
        ) -> $crate::kvs::store::http::Response {
            <$crate::Component as $crate::exports::kvs::store::sharding::Guest>::merge_responses(request, responses)
        }
    };
}

impl lifecycle::Guest for Component {
    fn describe() -> Description {
        // The table takes its seed here: in `apply` it would be the same in every process.
        STORE.with_borrow(|_| ());
        Description {
            name: "kvs".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            headers: rest::HEADERS.map(str::to_owned).into(),
            capabilities: vec!["key-prefix".to_owned()],
        }
    }

    fn apply(batch: Batch) {
        STORE.with_borrow_mut(|store| store.replay(&batch));
    }

    fn tick(now_ms: u64) -> Option<u64> {
        STORE.with_borrow_mut(|store| store.tick(now_ms, append))
    }

    fn stats() -> Statistics {
        STORE.with_borrow_mut(|store| {
            // The host asks when a replay is over, and before the guest serves.
            store.settle();
            Statistics { keys: store.keys(), bytes: store.bytes() }
        })
    }
}

impl handler::Guest for Component {
    fn handle(request: Request) -> Response {
        STORE.with_borrow_mut(|store| rest::respond(store, request, &mut Imports))
    }
}

impl sharding::Guest for Component {
    fn route(method: String, target: String) -> Target {
        rest::route(&method, &target)
    }

    fn extract_keys(body: Vec<u8>) -> Vec<String> {
        transaction::keys(&body)
    }

    fn merge_responses(request: Request, responses: Vec<Response>) -> Response {
        rest::merge(&request, responses)
    }
}
