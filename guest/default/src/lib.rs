//! The default guest as a component, which the host has in its binary: the store of `guest/kvs`, exported as it is. Apart
//! from the library, since guests that build on that have exports of their own.

#[cfg(target_arch = "wasm32")]
use kvs_guest::Kvs;

kvs_kit::export!(Kvs, sharding = Kvs);
