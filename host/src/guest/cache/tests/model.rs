//! The validity of kept responses under every interleaving that a model checker comes upon: nobody is given what was there
//! before a change of which anybody had heard, and no response of a guest after another one serves.

use shuttle::sync::Mutex;
use shuttle::sync::atomic::{AtomicU64, Ordering};
use shuttle::{check_pct, check_random, thread};

use self::sync::Arc;
use self::versions::{Stamp, Versions};

/// Of each scenario and scheduler.
const EXECUTIONS: usize = 5_000;
/// Changes of priority in one execution, beside which a mistake shows.
const DEPTH: usize = 4;
/// The hash of the key that all is about.
const KEY: u64 = 1 << 63;

/// What the file below finds in place of `cache/sync.rs`.
mod sync {
    pub use std::sync::Arc;

    use shuttle::sync::Mutex;
    pub use shuttle::sync::atomic;

    pub type Guard<T> = T;

    /// The calls of arc-swap's that are made.
    pub struct ArcSwap<T>(Mutex<Arc<T>>);

    impl<T> ArcSwap<T> {
        pub fn from_pointee(value: T) -> Self {
            Self(Mutex::new(Arc::new(value)))
        }

        pub fn load_full(&self) -> Arc<T> {
            Arc::clone(&self.0.lock().unwrap())
        }

        pub fn load(&self) -> Guard<Arc<T>> {
            self.load_full()
        }

        /// What it does is another value, or is done again.
        pub fn rcu<R: Into<Arc<T>>>(&self, mut next: impl FnMut(&Arc<T>) -> R) -> Arc<T> {
            let mut value = self.0.lock().unwrap();
            let next = next(&value).into();
            std::mem::replace(&mut *value, next)
        }
    }
}

#[expect(dead_code, reason = "the scenarios do not use all of it")]
#[expect(clippy::duplicate_mod, reason = "the same code, with other primitives below it")]
#[path = "../versions.rs"]
mod versions;

/// A guest with one key, whose response says which guest it was and which value the key had.
#[derive(Clone, Copy, Debug, Default)]
struct Response {
    guest: u64,
    value: u64,
}

/// A shard, its log, and one place for a response.
struct Server {
    /// Each generation is of a guest.
    versions: Versions<u64>,
    /// Its holder has the turn.
    turn: Mutex<Response>,
    /// The newest value in the log, as those who watch see it, and the guest that serves, once that was reported.
    log: AtomicU64,
    reported: AtomicU64,
    kept: Mutex<Option<Arc<(Stamp, Response)>>>,
}

impl Server {
    fn new() -> Arc<Self> {
        let (turn, kept) = (Mutex::default(), Mutex::default());
        let (log, reported) = (AtomicU64::new(0), AtomicU64::new(0));
        Arc::new(Self { versions: Versions::with(2, 0), turn, log, reported, kept })
    }

    fn put(&self) {
        let mut guest = self.turn.lock().unwrap();
        self.versions.announce(KEY);
        self.log.fetch_add(1, Ordering::SeqCst);
        guest.value += 1;
    }

    fn swap(&self) {
        let mut guest = self.turn.lock().unwrap();
        self.versions.next_generation(guest.guest + 1);
        guest.guest += 1;
        drop(guest);
        self.reported.fetch_add(1, Ordering::SeqCst);
    }

    /// Another history, of the guest that serves.
    fn take_over(&self) {
        self.versions.renew();
    }

    /// A request, which is answered with nothing that is older than what had been heard of before.
    fn get(&self) {
        let (value, guest) = (self.log.load(Ordering::SeqCst), self.reported.load(Ordering::SeqCst));
        let response = self.answer();
        assert!(response.value >= value, "{response:?} when {value} was in the log");
        assert!(response.guest >= guest, "{response:?} when guest {guest} served");
    }

    fn answer(&self) -> Response {
        let generation = self.versions.current();
        let kept = self.kept.lock().unwrap().clone();
        if let Some(kept) = kept
            && self.versions.is_current(&kept.0, &generation)
        {
            return kept.1;
        }
        let made = {
            let guest = self.turn.lock().unwrap();
            let serving = self.versions.generation();
            (self.versions.stamp(&serving, [KEY].into_iter()), *guest)
        };
        // Any time later.
        let response = made.1;
        *self.kept.lock().unwrap() = Some(Arc::new(made));
        response
    }
}

fn check(scenario: impl Fn() + Clone + Send + Sync + 'static) {
    check_random(scenario.clone(), EXECUTIONS);
    check_pct(scenario, EXECUTIONS, DEPTH);
}

type Deed = fn(&Server);

/// Does each in a thread of its own, this many times.
fn beside_each_other(deeds: &[(Deed, usize)]) -> Arc<Server> {
    let server = Server::new();
    let threads: Vec<_> = deeds
        .iter()
        .map(|&(deed, times)| {
            let server = Arc::clone(&server);
            thread::spawn(move || (0..times).for_each(|_| deed(&server)))
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    server
}

#[test]
fn no_change_that_was_heard_of_is_missed() {
    check(|| drop(beside_each_other(&[(Server::put, 2), (Server::get, 3), (Server::get, 3)])));
}

#[test]
fn no_response_crosses_a_swap() {
    check(|| drop(beside_each_other(&[(Server::swap, 1), (Server::put, 1), (Server::get, 3), (Server::get, 2)])));
}

#[test]
fn takeover_beside_a_swap_keeps_the_guest() {
    check(|| {
        let server = beside_each_other(&[(Server::swap, 2), (Server::take_over, 2), (Server::get, 2)]);
        let guest = server.turn.lock().unwrap().guest;
        assert_eq!(server.versions.generation().of, guest);
    });
}
