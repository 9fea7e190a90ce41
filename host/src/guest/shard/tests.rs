//! Model checking of the hand-off: in every interleaving one user at a time has the value, and nobody waits for one that is
//! free.

use std::sync::Arc;

use shuttle::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use shuttle::sync::mpsc::{Receiver, Sender, channel};
use shuttle::{check_pct, check_random, thread};

use self::handoff::{Entered, Handoff, Next, Visit};

/// Number of executions of each scenario with each scheduler.
const EXECUTIONS: usize = 5_000;
/// Number of priority changes in one execution of the PCT scheduler.
const DEPTH: usize = 3;

/// Replacement of `guest/sync.rs` for the file below.
mod sync {
    pub use std::sync::PoisonError;

    pub use shuttle::sync::{Mutex, MutexGuard};
}

#[expect(dead_code, reason = "the scenarios do not use all of it")]
#[expect(clippy::duplicate_mod, reason = "the same code, with other primitives below it")]
#[path = "handoff.rs"]
mod handoff;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Called,
    Withdrawn,
    Down,
}

/// The value: its own lock would hide a second user.
struct Instance;

#[derive(Default)]
struct Shard {
    handoff: Option<Handoff<Instance, Sender<Outcome>, Sender<Instance>>>,
    in_use: AtomicBool,
    ticks: AtomicU32,
}

impl Shard {
    fn new() -> Arc<Self> {
        Arc::new(Self { handoff: Some(Handoff::new(Instance)), ..Self::default() })
    }

    fn handoff(&self) -> &Handoff<Instance, Sender<Outcome>, Sender<Instance>> {
        self.handoff.as_ref().unwrap()
    }

    /// One use of the value.
    fn use_it(&self, _: &mut Instance) {
        assert!(!self.in_use.swap(true, Ordering::SeqCst), "two users at once");
        thread::yield_now();
        self.in_use.store(false, Ordering::SeqCst);
    }

    /// Serves the queue, as a turn does at its end.
    fn serve(&self, mut instance: Instance) {
        loop {
            instance = match self.handoff().next(instance) {
                Next::Idle => return,
                Next::Tick(instance) => {
                    self.ticks.fetch_add(1, Ordering::SeqCst);
                    instance
                }
                Next::Visit(instance, visitor) => return visitor.send(instance).unwrap(),
                Next::Call(mut instance, reply) => {
                    self.use_it(&mut instance);
                    let _ = reply.send(Outcome::Called);
                    instance
                }
            };
        }
    }

    fn arrive(&self) -> Result<Outcome, (u64, Receiver<Outcome>)> {
        match self.handoff().enter((), |()| channel()) {
            Entered::Free(mut instance, ()) => {
                self.use_it(&mut instance);
                self.serve(instance);
                Ok(Outcome::Called)
            }
            Entered::Queued(ticket, answer) => Err((ticket, answer)),
            Entered::Rejected(_) => Ok(Outcome::Down),
        }
    }

    fn call(&self) -> Outcome {
        self.arrive().unwrap_or_else(|(_, answer)| answer.recv().unwrap())
    }

    fn visit(&self, visit: Visit) -> Instance {
        let (sender, instance) = channel();
        self.handoff().visit(visit, || sender).unwrap_or_else(|| instance.recv().unwrap())
    }

    fn is_idle(&self) -> bool {
        self.handoff().queued() == 0 && self.handoff().tick().is_some()
    }
}

fn spawn<T: Send + 'static>(
    shard: &Arc<Shard>,
    work: impl FnOnce(&Shard) -> T + Send + 'static,
) -> thread::JoinHandle<T> {
    let shard = Arc::clone(shard);
    thread::spawn(move || work(&shard))
}

fn check(scenario: impl Fn() + Clone + Send + Sync + 'static) {
    check_random(scenario.clone(), EXECUTIONS);
    check_pct(scenario, EXECUTIONS, DEPTH);
}

#[test]
fn every_call_is_made_once() {
    check(|| {
        let shard = Shard::new();
        let calls = [(); 3].map(|()| spawn(&shard, Shard::call));
        assert_eq!(calls.map(|call| call.join().unwrap()), [Outcome::Called; 3]);
        assert!(shard.is_idle());
    });
}

#[test]
fn call_is_made_or_withdrawn() {
    check(|| {
        let shard = Shard::new();
        let other = spawn(&shard, Shard::call);
        let impatient = spawn(&shard, |shard| match shard.arrive() {
            Ok(outcome) => outcome,
            Err((ticket, _)) if shard.handoff().withdraw(ticket) => Outcome::Withdrawn,
            Err((_, answer)) => answer.recv().unwrap(),
        });
        assert_eq!(other.join().unwrap(), Outcome::Called);
        assert_ne!(impatient.join().unwrap(), Outcome::Down);
        assert!(shard.is_idle());
    });
}

#[test]
fn visitors_and_ticks_get_turns_beside_calls() {
    check(|| {
        let shard = Shard::new();
        let call = spawn(&shard, Shard::call);
        let visits = [Visit::Swap, Visit::Swap, Visit::Follow].map(|visit| {
            spawn(&shard, move |shard| {
                let mut instance = shard.visit(visit);
                shard.use_it(&mut instance);
                shard.serve(instance);
            })
        });
        let tick = spawn(&shard, |shard| {
            if let Some(instance) = shard.handoff().tick() {
                shard.ticks.fetch_add(1, Ordering::SeqCst);
                shard.serve(instance);
            }
        });
        assert_eq!(call.join().unwrap(), Outcome::Called);
        for visit in visits {
            visit.join().unwrap();
        }
        tick.join().unwrap();
        assert_eq!(shard.ticks.load(Ordering::SeqCst), 1);
        assert!(shard.is_idle());
    });
}

#[test]
fn calls_end_when_the_value_is_lost_and_replaced() {
    check(|| {
        let shard = Shard::new();
        let lost = shard.visit(Visit::Swap);
        let calls = [(); 2].map(|()| spawn(&shard, Shard::call));
        let rebuild = spawn(&shard, move |shard| {
            let Instance = lost;
            shard.handoff().reject().for_each(|reply| reply.send(Outcome::Down).unwrap());
            thread::yield_now();
            shard.handoff().replaced();
            shard.serve(Instance);
        });
        for call in calls {
            assert_ne!(call.join().unwrap(), Outcome::Withdrawn);
        }
        rebuild.join().unwrap();
        assert!(shard.is_idle());
    });
}
