//! Types and calls of the contract, generated from `wit/`, and their conversion from and to those of the log.
//!
//! Types that are passed in both directions exist twice: owned, as received from a guest, and borrowed, as passed to a
//! guest from a buffer.

use kvs_txlog as txlog;
use wasmtime::component::InstancePre;
use wasmtime::{AsContextMut, Engine};

mod store {
    wasmtime::component::bindgen!({
        path: "../wit",
        world: "sharded-store",
        ownership: Borrowing { duplicate_if_necessary: true },
    });
}

/// The package of the contract.
pub const PACKAGE: &str = "kvs:store";
/// The version of the contract that this host supports.
pub const VERSION: &str = "0.2.0";

use store::exports::kvs::store::{handler, lifecycle, sharding};

pub use lifecycle::{Batch, Description, Entry, EntryPut, Statistics};
pub use sharding::{Guest as Sharding, Target};
pub use store::kvs::store::http::{
    Grant, HeaderParam as HeaderRef, Request, ResponseParam as ResponseRef, ResponseResult as Response, Scope,
};
pub use store::kvs::store::transaction_log::{AppendError, Event};
pub use store::kvs::store::watch::Selector;

#[cfg(any(test, feature = "compiler"))]
pub use store::kvs::store::http::HeaderResult as HeaderOwned;

// The calls: what the host offers (a trait for each imported interface), and what it makes.
pub use store::ShardedStore as Imports;
pub use store::kvs::store::{
    connection, http, logging, metrics, request_context, response_cache, timer, transaction_log, watch,
};
pub use store::wasi::config::store as config;

/// Exports of a component, found before it is instantiated.
pub struct ExportsPre<T: 'static> {
    instance: InstancePre<T>,
    lifecycle: lifecycle::GuestIndices,
    handler: handler::GuestIndices,
    /// None in the world `store`.
    sharding: Option<sharding::GuestIndices>,
}

/// Exports of an instance.
pub struct Exports {
    pub lifecycle: lifecycle::Guest,
    pub handler: handler::Guest,
    pub sharding: Option<sharding::Guest>,
}

impl<T: 'static> ExportsPre<T> {
    /// With `sharding` where `is_sharded`.
    pub fn new(instance: InstancePre<T>, is_sharded: bool) -> wasmtime::Result<Self> {
        Ok(Self {
            lifecycle: lifecycle::GuestIndices::new(&instance)?,
            handler: handler::GuestIndices::new(&instance)?,
            sharding: is_sharded.then(|| sharding::GuestIndices::new(&instance)).transpose()?,
            instance,
        })
    }

    pub fn engine(&self) -> &Engine {
        self.instance.engine()
    }

    pub fn instance(&self) -> &InstancePre<T> {
        &self.instance
    }

    pub fn is_sharded(&self) -> bool {
        self.sharding.is_some()
    }

    pub fn instantiate(&self, mut store: impl AsContextMut<Data = T>) -> wasmtime::Result<Exports> {
        let instance = self.instance.instantiate(&mut store)?;
        Ok(Exports {
            lifecycle: self.lifecycle.load(&mut store, &instance)?,
            handler: self.handler.load(&mut store, &instance)?,
            sharding: self.sharding.as_ref().map(|sharding| sharding.load(&mut store, &instance)).transpose()?,
        })
    }
}

impl From<Event> for txlog::Event {
    fn from(event: Event) -> Self {
        match event {
            Event::Put(put) => Self::Put(txlog::Put {
                key: put.key,
                value: put.value,
                metadata: put.metadata,
                expires: put.expires_at_ms,
            }),
            Event::Delete(key) => Self::Delete(key),
        }
    }
}

impl From<txlog::AppendError> for AppendError {
    fn from(error: txlog::AppendError) -> Self {
        match error {
            txlog::AppendError::InsufficientStorage => Self::InsufficientStorage,
            txlog::AppendError::Unavailable => Self::Unavailable,
            txlog::AppendError::ReadOnly => Self::ReadOnly,
            txlog::AppendError::TooLarge(limit) => Self::TooLarge(limit),
        }
    }
}
