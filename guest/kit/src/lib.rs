//! The kit for guests in Rust.
//!
//! A guest is a type with a [`guest::Guest`] implementation, which responds to requests, and a [`state::State`], which its log
//! entries make; [`export!`] makes a component of it. `guest/template` is the smallest one, `guest/locks` one that extends the
//! default store.
//!
//! Owns: the generated contract, and what every guest needs of requests, responses and state. Must never know: what a guest
//! stores, or what its paths mean.

pub mod allocator;
pub mod answer;
pub mod conditions;
pub mod duration;
pub mod guest;
pub mod host;
pub mod key;
pub mod log;
pub mod metrics;
pub mod path;
pub mod percent;
pub mod query;
pub mod sharding;
pub mod state;
pub mod testing;
pub mod text;

pub use bindings::kvs::store::http::{Header, Request, Response};
pub use bindings::kvs::store::transaction_log::{AppendError, Event, Put};
pub use bindings::wasi::config::store as config;
pub use guest::Guest;
pub use sharding::{Sharding, Target};
pub use state::Logged;

/// The contract without routing: the world `store`.
pub mod bindings {
    wit_bindgen::generate!({
        path: "../../wit",
        world: "store",
        generate_all,
        // The component exports the guest: `export!`.
        pub_export_macro: true,
        // For tests, which compare responses and events.
        additional_derives: [PartialEq],
    });
}

/// The export that the world `sharded-store` has beside. A component has what its crates export together.
pub mod sharding_bindings {
    wit_bindgen::generate!({
        path: "../../wit",
        inline: "
            package kvs:kit;

            world sharding {
                export kvs:store/sharding@0.2.0;
            }
        ",
        world: "kvs:kit/sharding",
        with: { "kvs:store/http@0.2.0": crate::bindings::kvs::store::http },
        pub_export_macro: true,
        additional_derives: [PartialEq],
    });
}
