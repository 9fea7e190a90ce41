//! The guest: the component that holds the store and gives HTTP its meaning.
//!
//! Owns: compiling and checking guests, calling them within their limits, giving them back their state, replacing them.
//! Must never know: sockets, TLS, how the log keeps its promise.
//!
//! Read `engine` first (what may run), then `instance` (one call), with `message` (what goes in and comes out) and `imports`
//! (what the guest finds when it calls out; `output` has its log lines, `custom` its metrics); then `shard` (many calls, one at a time), `shards` (which of several is
//! called), `cache` (which calls need not be made), `replica` (how an instance comes by its state, and follows with it as a
//! spare), `shadow` (another guest is given real requests before it serves), `swap` (another guest takes over) and `check` (a
//! guest is tested without a server).

mod absent;
mod alarm;
mod batch;
mod cache;
#[cfg(feature = "compiler")]
mod check;
mod clock;
mod compile;
mod compiled;
#[cfg_attr(not(feature = "compiler"), path = "no_compiler.rs")]
mod compiler;
mod custom;
mod engine;
mod epoch;
mod fixed;
mod housekeeping;
mod huge_pages;
mod imports;
mod inspect;
mod instance;
mod key;
mod limits;
mod memory;
mod message;
mod metrics;
mod outage;
mod output;
mod owner;
mod quota;
mod reload;
mod replica;
mod routers;
mod sandbox;
mod shadow;
mod shard;
mod shards;
mod source;
mod swap;
mod sync;
mod trap;

pub use cache::ResponseCache;
#[cfg(feature = "compiler")]
pub use check::{Plan as TestPlan, Request as TestRequest, test};
pub use compile::compile;
pub use engine::{Engine, Guest};
pub use inspect::inspect;
pub use key::check as check_key;
pub use limits::Limits;
pub use message::{Answer, Client, Incoming, Sequel, Wait, Watch};
pub use quota::Quota;
pub use reload::Reload;
pub use replica::Replayed;
pub use shadow::{MAX_DURATION as MAX_SHADOW, Plan as ShadowPlan};
pub use shard::CallError;
pub use shards::{Arrangement, Paused, Shards};
pub use source::{
    BUILT_IN_FILE, GUEST_BYTES, Identity as GuestIdentity, Source, read as read_component, record as record_guest,
};
pub use swap::{Ended, Outcome, Steps, SwapError, Swapper};
