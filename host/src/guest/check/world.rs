//! The surroundings of a guest that is tested: time that passes when the test says so, and randomness from a seed. What is found
//! is found again with the same seed.

use std::future::{Future, ready};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use kvs_runtime::{Clock, Entropy, Env, Random, Time};

/// The time at which a test begins, in 2026.
const BEGIN: Duration = Duration::from_secs(1_782_000_000);

pub struct World {
    begun: Instant,
    passed: Mutex<Duration>,
    random: Mutex<fastrand::Rng>,
}

impl World {
    pub fn new(env: &Env, seed: u64) -> Arc<Self> {
        let random = Mutex::new(fastrand::Rng::with_seed(seed));
        Arc::new(Self { begun: env.clock.now(), passed: Mutex::default(), random })
    }

    /// What guests are given.
    pub fn env(self: &Arc<Self>, real: &Env) -> Env {
        let (clock, random) = (Clock::given(Arc::clone(self) as _), Random::given(Arc::clone(self) as _));
        Env { clock, random, tasks: real.tasks.clone() }
    }

    /// Lets time pass.
    pub fn pass(&self, time: Duration) {
        *lock(&self.passed) += time;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Time for World {
    fn now(&self) -> Instant {
        self.begun + *lock(&self.passed)
    }

    fn wall(&self) -> SystemTime {
        UNIX_EPOCH + BEGIN + *lock(&self.passed)
    }

    fn sleep(&self, time: Duration) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        self.pass(time);
        Box::pin(ready(()))
    }
}

impl Entropy for World {
    fn fill(&self, bytes: &mut [u8]) {
        lock(&self.random).fill(bytes);
    }
}
