//! Epochs: the clock that ends calls that take too long, and lets those that take long make way.

use std::io;
use std::sync::mpsc;
use std::time::Duration;

use kvs_runtime::Env;
use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::task::block_in_place;
use wasmtime::EngineWeak;

/// The grain of CPU time limits: a call is ended this much late at most.
const EPOCH: Duration = Duration::from_millis(10);

/// A call that takes longer than this many epochs makes way for what else its thread is there for.
pub const LONG: u64 = 2;

/// Counts them, for as long as there is the engine.
pub fn tick(ticking: EngineWeak, env: &Env) -> io::Result<()> {
    let clock = env.clock.clone();
    let tick = move || {
        while let Some(engine) = ticking.upgrade() {
            engine.increment_epoch();
            drop(engine);
            clock.pause(EPOCH);
        }
        Ok(())
    };
    env.tasks.restart_thread("epoch", &env.clock, tick).map(drop)
}

/// The number of epochs after which a call has certainly had `limit`.
pub fn epochs(limit: Duration) -> u64 {
    let epochs = limit.as_nanos().div_ceil(EPOCH.as_nanos());
    // The epoch in progress does not count: it may end at once.
    u64::try_from(epochs).unwrap_or(u64::MAX - 1) + 1
}

/// Gives what this thread has to do beside a call to another thread. A thread of the runtime may be the one that watches the
/// sockets, and holds tasks that no other can take from it: connections would hang as long as the call runs.
///
/// It may not succeed every time, and can be called again.
#[expect(clippy::disallowed_methods, reason = "a task that only finds out whether another thread is there")]
pub fn make_way() {
    let Ok(runtime) = Handle::try_current() else { return };
    if runtime.runtime_flavor() == RuntimeFlavor::CurrentThread {
        return; // There is no other.
    }
    block_in_place(|| {
        // What was given away is taken back at the end of this, unless another thread has begun with it.
        let (begun, begins) = mpsc::channel();
        runtime.spawn(async move { begun.send(()) });
        let _ = begins.recv_timeout(EPOCH);
    });
}
