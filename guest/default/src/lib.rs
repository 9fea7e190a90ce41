//! The default guest as a component, which the host has in its binary: the store of `guest/kvs`, exported as it is. Apart
//! from the library, since guests that build on that have exports of their own.

// The names under which a component exports its calls are none that a native linker takes.
#[cfg(target_arch = "wasm32")]
kvs_guest::export!(Component with_types_in kvs_guest);
#[cfg(target_arch = "wasm32")]
use kvs_guest::Component;

#[cfg(target_arch = "wasm32")]
#[global_allocator]
static ALLOCATOR: kvs_guest::allocator::Allocator<std::alloc::System> =
    kvs_guest::allocator::Allocator::new(std::alloc::System);
