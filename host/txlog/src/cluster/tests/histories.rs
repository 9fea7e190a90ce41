//! Histories: clients, and trouble of every kind, in any order. Then all is well, and what is in the log is compared with
//! what clients were answered.

use std::cell::RefCell;
use std::collections::HashMap;
use std::iter;
use std::ops::Range;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use super::executor::{Executor, WORLD};
use super::mutants;
use super::process::{Seen, World};
use crate::Condition;
use crate::cluster::compaction::{self, Manner};
use crate::cluster::frame::Tip;

const HOSTS: usize = 3;
const TROUBLE: Duration = Duration::from_secs(80);
/// Longer than a takeover takes, and a failed read is retried.
const CALM: Duration = Duration::from_secs(60);

/// Number of histories of a test run. Each mutant must be found in as many.
const SEEDS: u64 = 2_000;
const THREADS: usize = 2;

/// Totals of a history.
#[derive(Default)]
struct Totals {
    acknowledged: usize,
    reads: u64,
    takeovers: u64,
    /// Frames that compaction dropped.
    dropped: usize,
}

/// Runs a history. Returns the first violation.
fn history(seed: u64) -> Result<Totals, String> {
    let mut executor = Executor::new(seed);
    let sim = executor.sim.clone();
    let world = World::new(&executor, HOSTS);
    for client in 0..4 {
        let world = world.clone();
        // A client belongs to its host: when that is paused, so is its request.
        world.locals.clone().start(WORLD, async move {
            while world.sim.now() < TROUBLE + CALM {
                let pause = world.sim.millis(5..800);
                world.sim.sleep(pause).await;
                let host = world.sim.dice(HOSTS as u64) as usize;
                let process = world.hosts[host].borrow().process;
                if world.sim.is_dead(process) {
                    continue;
                }
                let (request, writes) = (world.clone(), client % 2 == 0);
                // The request runs in the server.
                world.locals.start(process, async move {
                    if writes { request.write(host).await } else { request.read(host).await }
                });
            }
        });
    }
    let nemesis = world.clone();
    world.locals.start(WORLD, async move {
        while nemesis.sim.now() < TROUBLE {
            trouble(&nemesis).await;
        }
        nemesis.cluster.state().heal();
    });
    executor.run_until(TROUBLE + CALM);
    let before = world.seen.acknowledged.borrow().len();
    for _ in 0..8 {
        for host in 0..HOSTS {
            let (world, process) = (world.clone(), world.hosts[host].borrow().process);
            world.locals.clone().start(process, async move { world.write(host).await });
        }
        let until = sim.now() + Duration::from_secs(5);
        executor.run_until(until);
    }
    if world.seen.acknowledged.borrow().len() == before {
        world.violation("no write is acknowledged any more".into());
    }
    let end = world.cluster.state().sequence();
    for (number, host) in world.hosts.iter().enumerate() {
        if let Some(log) = host.borrow().log.as_ref().filter(|log| log.queue.appended() < end) {
            let (applied, condition) = (log.queue.appended(), log.condition());
            world.violation(format!("host {number} is still at {applied}, but the log ends at {end}: {condition:?}"));
        }
    }
    check(&world)
}

/// One kind of trouble, for a while.
async fn trouble(world: &World) {
    let World { sim, cluster, .. } = world;
    let calm = sim.millis(100..3_000);
    sim.sleep(calm).await;
    let host = sim.dice(HOSTS as u64) as usize;
    let process = world.hosts[host].borrow().process;
    let (short, long) = (sim.millis(100..9_000), sim.millis(1_000..25_000));
    match sim.dice(12) {
        0 => {
            sim.pause(process);
            sim.sleep(long).await;
            sim.resume(process);
            read_there(world, host);
        }
        1 => world.kill(host, short),
        2 => {
            cluster.state().cut_off.push(host);
            sim.sleep(long).await;
            cluster.state().cut_off.clear();
            read_there(world, host);
        }
        3 => {
            cluster.state().no_leader = true;
            sim.sleep(short).await;
            cluster.state().no_leader = false;
        }
        4 => {
            cluster.state().lost_acks = 40;
            sim.sleep(short).await;
            cluster.state().lost_acks = 0;
        }
        5 => {
            cluster.state().lost_requests = 40;
            sim.sleep(short).await;
            cluster.state().lost_requests = 0;
        }
        6 => {
            cluster.state().late_requests = 30;
            sim.sleep(short).await;
            cluster.state().late_requests = 0;
        }
        7 => {
            cluster.state().refusals = 30;
            sim.sleep(short).await;
            cluster.state().refusals = 0;
        }
        8 => {
            cluster.state().damaged_reads = 30;
            sim.sleep(long).await;
            cluster.state().damaged_reads = 0;
        }
        9 => {
            cluster.state().is_full = true;
            sim.sleep(short).await;
            cluster.state().is_full = false;
        }
        10 => {
            let end = cluster.state().frames.len() as u64;
            cluster.state().former_end = Some(end);
            sim.sleep(short).await;
            cluster.state().former_end = None;
        }
        _ => {
            let (replica, frames) = (sim.dice(3) as usize, cluster.state().frames.len() as u64);
            let frame = sim.dice(frames + 8) as usize;
            cluster.state().lose_frame(replica, frame);
            cluster.state().lag = 60;
            sim.sleep(long).await;
            cluster.state().lag = 0;
        }
    }
}

/// Clients read at a host that was away, and does not know that another one has taken over.
fn read_there(world: &World, host: usize) {
    let process = world.hosts[host].borrow().process;
    for _ in 0..10 {
        let (request, delay) = (world.clone(), world.sim.millis(0..1_000));
        world.locals.start(process, async move {
            request.sim.sleep(delay).await;
            request.read(host).await;
        });
    }
}

/// Compares what is in the log with what clients were answered.
fn check(world: &World) -> Result<Totals, String> {
    let state = world.cluster.state();
    if let Some(violation) = state.violations.first() {
        return Err(violation.clone());
    }
    let mut places = HashMap::new();
    for (index, key) in state.keys.iter().enumerate() {
        if places.insert(key, index as u64 + 1).is_some() {
            return Err(format!("{key} is in the log twice"));
        }
    }
    let acknowledged = world.seen.acknowledged.borrow();
    for (sequence, key) in acknowledged.iter() {
        if places.get(key) != Some(sequence) {
            return Err(format!("{key} was acknowledged as {sequence}, but is {:?}", places.get(key)));
        }
    }
    let Seen { reads, takeovers, .. } = &*world.seen;
    let (acknowledged, dropped) = (acknowledged.len(), state.dropped);
    Ok(Totals { acknowledged, reads: reads.get(), takeovers: takeovers.get(), dropped })
}

/// Seeds of the histories; `just soak` runs more, and `KVS_CLUSTER_SEED` repeats one.
fn seeds() -> Range<u64> {
    let number = |name| std::env::var(name).ok().map(|text| text.parse().expect("it is a number"));
    match number("KVS_CLUSTER_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("KVS_CLUSTER_HISTORIES").unwrap_or(SEEDS),
    }
}

#[test]
fn nothing_acknowledged_is_lost_or_doubled_and_no_read_is_stale() {
    let seeds = seeds();
    let count = seeds.end - seeds.start;
    let seeds = Mutex::new(seeds);
    let next = || seeds.lock().expect("nothing panics under it").next();
    let work = || iter::from_fn(&next).map(|seed| (seed, history(seed))).collect::<Vec<_>>();
    let mut totals = Totals::default();
    thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(work)).collect();
        for (seed, outcome) in threads.into_iter().flat_map(|thread| thread.join().expect("it does not panic")) {
            let Totals { acknowledged, reads, takeovers, dropped } = outcome
                .unwrap_or_else(|violation| panic!("seed {seed}: {violation}; repeat it with KVS_CLUSTER_SEED={seed}"));
            totals.acknowledged += acknowledged;
            totals.reads += reads;
            totals.takeovers += takeovers;
            totals.dropped += dropped;
        }
    });
    let Totals { acknowledged, reads, takeovers, dropped } = totals;
    println!(
        "{count} histories: {acknowledged} writes acknowledged, {reads} reads, {takeovers} takeovers, {dropped} frames dropped"
    );
    assert!(takeovers >= count && reads > count && acknowledged as u64 > count && dropped as u64 > 10 * count);
}

#[test]
fn history_repeats_with_its_seed() {
    let run = || history(3).map(|totals| (totals.acknowledged, totals.reads, totals.takeovers));
    assert_eq!(run(), run());
}

#[test]
fn mutants_are_found() {
    const MUTANTS: [&str; 13] = [
        "WatchBeforeDurable",
        "UnknownIsDurable",
        "RefusedIsLost",
        "ClaimWithoutReading",
        "LeaseFromReceipt",
        "LeaseCheckedBefore",
        "GapSkipped",
        "PreviousIgnored",
        "SequenceReused",
        "NoBarrier",
        "DroppedBeforeSnapshot",
        "DroppedBeyondSnapshot",
        "DroppedIsDamage",
    ];
    for mutant in MUTANTS {
        let found = mutants::with(mutant, || (0..SEEDS).find_map(|seed| Some((seed, history(seed).err()?))));
        let (seed, violation) = found.unwrap_or_else(|| panic!("{mutant} is not found"));
        println!("{mutant}: seed {seed}: {violation}");
    }
}

/// The end of the log is lost while a process is primary, and another one would continue what is left.
#[test]
fn lost_end_is_never_continued() {
    let mut executor = Executor::new(0);
    let world = World::new(&executor, 1);
    executor.run_until(Duration::from_secs(20));
    for second in 21..25 {
        let request = world.clone();
        world.locals.start(WORLD, async move { request.write(0).await });
        executor.run_until(Duration::from_secs(second));
    }
    assert_eq!(world.seen.acknowledged.borrow().len(), 4);
    let left = {
        let mut state = world.cluster.state();
        state.lose_end(2);
        state.frames.len()
    };
    let mut violations = |until| {
        executor.run_until(Duration::from_secs(until));
        world.cluster.state().violations.clone()
    };
    // A former leader answers like this too.
    assert_eq!(violations(35), Vec::<String>::new());
    let found = violations(90);
    assert!(found.len() > 1, "{found:?}");
    assert!(
        found[0].contains("failed: the transaction log failed: the engine has lost the end of the log"),
        "{found:?}"
    );
    assert!(found[1].contains("cannot open the log: the engine has lost the end of the log"), "{found:?}");
    assert_eq!(world.cluster.state().frames.len(), left, "the log was continued");
}

/// One replica lacks a frame, and the others have it: reads succeed, and the damage is reported until it is repaired.
#[test]
fn damage_in_one_replica_is_reported_while_it_lasts() {
    for seed in 0..20 {
        let mut executor = Executor::new(seed);
        let world = World::new(&executor, 1);
        world.seen.compaction_bytes.set(u64::MAX);
        executor.run_until(Duration::from_secs(25));
        let shared = world.hosts[0].borrow().log.clone().expect("it is open");
        let mut now = 25;
        let mut pass = |seconds| {
            now += seconds;
            executor.run_until(Duration::from_secs(now));
        };
        assert_eq!(shared.condition(), Condition::Well);
        world.cluster.state().lose_frame(1, 0);
        let reader = Arc::clone(&shared);
        world.locals.start(WORLD, async move {
            for _ in 0..20 {
                reader.read(&mut Tip::default(), Duration::ZERO).await.expect("two replicas have it");
            }
        });
        pass(10);
        let Condition::But(reason) = shared.condition() else { panic!("seed {seed}: not reported") };
        assert!(reason.starts_with("damaged in a replica: a replica lacks it"), "{reason}");
        pass(300);
        assert!(matches!(shared.condition(), Condition::But(_)), "seed {seed}: forgotten");
        world.cluster.state().repair();
        pass(60);
        assert_eq!(shared.condition(), Condition::Well, "seed {seed}");
    }
}

/// Two operators compact at the same time, and one of them finds the snapshot of the other.
#[test]
fn runs_of_compaction_at_one_position_lose_nothing() {
    for seed in 0..50 {
        let mut executor = Executor::new(seed);
        let world = World::new(&executor, 1);
        executor.run_until(Duration::from_secs(25));
        let shared = world.hosts[0].borrow().log.clone().expect("it is open");
        let outcomes = Rc::new(RefCell::new(Vec::new()));
        for _ in 0..2 {
            let (shared, outcomes) = (Arc::clone(&shared), Rc::clone(&outcomes));
            world.locals.start(WORLD, async move {
                let outcome = compaction::compact(&shared, Manner::Command).await;
                outcomes.borrow_mut().push(outcome.is_ok());
            });
        }
        executor.run_until(Duration::from_secs(60));
        assert!(outcomes.borrow().len() == 2 && outcomes.borrow().contains(&true), "seed {seed}: {outcomes:?}");
        world.kill(0, Duration::from_secs(1_000));
        let opened = start_another(&world);
        executor.run_until(Duration::from_secs(120));
        assert_eq!(*opened.borrow(), Some(Ok(())), "seed {seed}");
    }
}

/// Starts another process, without `--standby`. Returns the outcome of its start, once there is one.
fn start_another(world: &World) -> Rc<RefCell<Option<Result<(), String>>>> {
    let opened = Rc::new(RefCell::new(None));
    let (begun, ended) = (world.clone(), Rc::clone(&opened));
    let newcomer = 1_000;
    world.locals.start(newcomer, async move {
        let log = begun.log(0, newcomer, false);
        *ended.borrow_mut() = Some(log.open(false).await.map(drop).map_err(|error| error.to_string()));
    });
    opened
}

/// The primary was killed, and the stream is full: a start reports it, and ends.
#[test]
fn start_that_cannot_claim_ends() {
    for seed in 0..20 {
        let mut executor = Executor::new(seed);
        let world = World::new(&executor, 1);
        executor.run_until(Duration::from_secs(25));
        world.kill(0, Duration::from_secs(1_000));
        world.cluster.state().is_full = true;
        let opened = start_another(&world);
        // A lease, and 20 s.
        executor.run_until(Duration::from_secs(60));
        let reason = opened.borrow().clone().and_then(Result::err).unwrap_or_default();
        assert!(reason.starts_with("it cannot be claimed for 20s: the stream is full: "), "seed {seed}: {reason:?}");
    }
}

/// Space comes back before the start has given up: it claims the log.
#[test]
fn start_over_full_stream_claims_once_there_is_space() {
    for seed in 0..20 {
        let mut executor = Executor::new(seed);
        let world = World::new(&executor, 1);
        executor.run_until(Duration::from_secs(25));
        world.kill(0, Duration::from_secs(1_000));
        world.cluster.state().is_full = true;
        let opened = start_another(&world);
        executor.run_until(Duration::from_secs(42));
        world.cluster.state().is_full = false;
        executor.run_until(Duration::from_secs(60));
        assert_eq!(*opened.borrow(), Some(Ok(())), "seed {seed}");
    }
}

/// The engine is away for longer than the lease, for all alike: a server that starts must not take the log from a primary that lives.
#[test]
fn start_over_an_outage_does_not_preempt_live_primary() {
    for seed in 0..20 {
        let mut executor = Executor::new(seed);
        let world = World::new(&executor, 1);
        executor.run_until(Duration::from_secs(25));
        let opened = start_another(&world);
        // It has found the end of the log, and no frame of the primary yet that shows that it lives.
        executor.run_until(Duration::from_millis(25_050));
        world.cluster.state().no_leader = true;
        executor.run_until(Duration::from_secs(37));
        assert_eq!(*opened.borrow(), None, "seed {seed}");
        world.cluster.state().no_leader = false;
        executor.run_until(Duration::from_secs(60));
        let opened = opened.borrow().clone();
        assert!(
            matches!(&opened, Some(Err(reason)) if reason.starts_with("it is in use by ")),
            "seed {seed}: {opened:?}"
        );
        assert_eq!(world.cluster.state().violations, Vec::<String>::new(), "seed {seed}");
    }
}
