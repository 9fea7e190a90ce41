//! Types and calls of the contract, generated from `wit/`, and their conversion from and to those of the log.
//!
//! Types that travel in both directions come twice, once owned (handed over by a guest) and once borrowed (handed to a
//! guest, straight from the buffer they lie in).

use kvs_txlog as txlog;

mod store {
    wasmtime::component::bindgen!({
        path: "../wit",
        world: "store",
        ownership: Borrowing { duplicate_if_necessary: true },
    });
}

pub use store::exports::kvs::store::lifecycle::{Description, Statistics};
pub use store::exports::kvs::store::sharding::Placement;
pub use store::kvs::store::http::{
    HeaderParam as HeaderRef, Request, ResponseParam as ResponseRef, ResponseResult as Response,
};
pub use store::kvs::store::transaction_log::{
    AppendError, Entry, EventParam as EventRef, EventResult as Event, PutParam as PutRef,
};

// The calls: what the host offers (a trait for each imported interface), and what it makes.
pub use store::kvs::store::{changes, connection, http, transaction_log};
pub use store::wasi::config::store as config;
pub use store::{Store as Exports, StorePre as ExportsPre};

impl From<Event> for txlog::Event {
    fn from(event: Event) -> Self {
        match event {
            Event::Put(put) => {
                Self::Put(txlog::Put { key: put.key, value: put.value, metadata: put.metadata, expires: put.expires })
            }
            Event::Delete(key) => Self::Delete(key),
        }
    }
}

impl<'a> From<&txlog::Entry<'a>> for Entry<'a> {
    fn from(entry: &txlog::Entry<'a>) -> Self {
        let event = match entry.event {
            txlog::EventRef::Put(txlog::PutRef { key, value, metadata, expires }) => {
                EventRef::Put(PutRef { key, value, metadata, expires })
            }
            txlog::EventRef::Delete(key) => EventRef::Delete(key),
        };
        Self { sequence: entry.sequence, time: entry.time, event }
    }
}

impl From<txlog::AppendError> for AppendError {
    fn from(error: txlog::AppendError) -> Self {
        match error {
            txlog::AppendError::InsufficientStorage => Self::Full,
            txlog::AppendError::Unavailable => Self::Unavailable,
            txlog::AppendError::ReadOnly => Self::ReadOnly,
            txlog::AppendError::TooLarge(limit) => Self::TooLarge(limit),
        }
    }
}
