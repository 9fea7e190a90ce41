//! The contract's types and calls, generated from `wit/`.
//!
//! Both the guest side and the log side of the host speak in these: the log stores exactly what the contract says
//! happened. Types that travel in both directions come twice, once owned (what a guest handed over) and once borrowed
//! (what is handed to a guest, straight from the buffer it lies in).

mod store {
    wasmtime::component::bindgen!({
        path: "wit",
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
    AppendError, Entry, EventParam as EventRef, EventResult as Event, PutParam as PutRef, PutResult as Put,
};

// The calls: what the host offers (a trait for each imported interface), and what it makes.
pub use store::kvs::store::{changes, connection, http, transaction_log};
pub use store::wasi::config::store as config;
pub use store::{Store as Exports, StorePre as ExportsPre};

impl Event {
    pub fn key(&self) -> &str {
        match self {
            Self::Put(put) => &put.key,
            Self::Delete(key) => key,
        }
    }
}

impl<'e> EventRef<'e> {
    pub fn key(&self) -> &'e str {
        match self {
            Self::Put(put) => put.key,
            Self::Delete(key) => key,
        }
    }
}
