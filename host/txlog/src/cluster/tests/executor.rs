//! An executor of tasks with virtual time: the same seed gives the same history. Processes can be paused and killed.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashSet};
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use kvs_runtime::{BoxedTask, BoxedWork, Clock, Entropy, Env, Random, Spawn, Tasks, Time};

/// A process; 0 is the world around them.
pub type Process = usize;
pub const WORLD: Process = 0;

type Local = Pin<Box<dyn Future<Output = ()>>>;

static BEGINNING: LazyLock<Instant> = LazyLock::new(Instant::now);

#[derive(Clone)]
pub struct Sim(Arc<Mutex<State>>);

struct State {
    now: Duration,
    ready: Vec<usize>,
    timers: BTreeMap<(Duration, u64), Waker>,
    timer: u64,
    spawned: Vec<(Process, BoxedTask)>,
    paused: HashSet<Process>,
    dead: HashSet<Process>,
    dice: fastrand::Rng,
}

pub struct Executor {
    pub sim: Sim,
    tasks: Vec<Option<(Process, Local)>>,
    /// Tasks of paused processes that were woken.
    held: BTreeMap<Process, Vec<usize>>,
    locals: Locals,
}

/// Starts tasks that stay in this thread.
#[derive(Clone, Default)]
pub struct Locals(Rc<RefCell<Vec<(Process, Local)>>>);

impl Locals {
    pub fn start(&self, process: Process, task: impl Future<Output = ()> + 'static) {
        self.0.borrow_mut().push((process, Box::pin(task)));
    }
}

struct Task {
    sim: Sim,
    id: usize,
}

impl Wake for Task {
    fn wake(self: Arc<Self>) {
        let mut state = self.sim.state();
        if !state.ready.contains(&self.id) {
            state.ready.push(self.id);
        }
    }
}

impl Sim {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("nothing panics under it")
    }

    pub fn now(&self) -> Duration {
        self.state().now
    }

    /// Returns a number below this one.
    pub fn dice(&self, below: u64) -> u64 {
        self.state().dice.u64(0..below)
    }

    pub fn chance(&self, percent: u64) -> bool {
        self.dice(100) < percent
    }

    pub fn millis(&self, range: std::ops::Range<u64>) -> Duration {
        Duration::from_micros(self.state().dice.u64(range.start * 1000..range.end * 1000))
    }

    pub async fn sleep(&self, time: Duration) {
        Sleep { sim: self.clone(), until: self.now() + time, timer: None }.await;
    }

    pub fn pause(&self, process: Process) {
        self.state().paused.insert(process);
    }

    pub fn kill(&self, process: Process) {
        self.state().dead.insert(process);
    }

    pub fn is_dead(&self, process: Process) -> bool {
        self.state().dead.contains(&process)
    }

    pub fn resume(&self, process: Process) {
        self.state().paused.remove(&process);
    }

    pub fn spawn(&self, process: Process, task: impl Future<Output = ()> + Send + 'static) {
        self.state().spawned.push((process, Box::pin(task)));
    }

    /// Returns the environment of a process, whose clock runs faster by this many percent.
    pub fn env(&self, process: Process, drift: i32) -> Env {
        let own = Own { sim: self.clone(), process, rate: 1.0 + f64::from(drift) / 100.0 };
        let own = Arc::new(own);
        Env {
            clock: Clock::given(Arc::clone(&own) as _),
            random: Random::given(Arc::clone(&own) as _),
            tasks: Tasks::given(own),
        }
    }
}

struct Sleep {
    sim: Sim,
    until: Duration,
    /// Number of its timer.
    timer: Option<u64>,
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let sim = self.sim.clone();
        let mut state = sim.state();
        if state.now >= self.until {
            return Poll::Ready(());
        }
        state.timer += 1;
        let timer = *self.timer.get_or_insert(state.timer);
        state.timers.insert((self.until, timer), context.waker().clone());
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(timer) = self.timer {
            self.sim.state().timers.remove(&(self.until, timer));
        }
    }
}

/// The surroundings of one process.
struct Own {
    sim: Sim,
    process: Process,
    rate: f64,
}

impl Time for Own {
    fn now(&self) -> Instant {
        *BEGINNING + self.sim.now().mul_f64(self.rate)
    }

    fn wall(&self) -> SystemTime {
        UNIX_EPOCH + self.sim.now()
    }

    fn sleep(&self, time: Duration) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        // Rounded up: time has passed by the clock too.
        let (sim, time) = (self.sim.clone(), time.div_f64(self.rate) + Duration::from_micros(1));
        Box::pin(async move { sim.sleep(time).await })
    }
}

impl Entropy for Own {
    fn fill(&self, bytes: &mut [u8]) {
        self.sim.state().dice.fill(bytes);
    }
}

impl Spawn for Own {
    fn thread(&self, _: &str, _: BoxedWork) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn task(&self, _: &str, task: BoxedTask) {
        self.sim.spawn(self.process, task);
    }
}

impl Executor {
    pub fn new(seed: u64) -> Self {
        let state = State {
            now: Duration::ZERO,
            ready: Vec::new(),
            timers: BTreeMap::new(),
            timer: 0,
            spawned: Vec::new(),
            paused: HashSet::new(),
            dead: HashSet::new(),
            dice: fastrand::Rng::with_seed(seed),
        };
        // That of the breaker's jitter.
        fastrand::seed(seed);
        let sim = Sim(Arc::new(Mutex::new(state)));
        Self { sim, tasks: Vec::new(), held: BTreeMap::new(), locals: Locals::default() }
    }

    pub fn locals(&self) -> Locals {
        self.locals.clone()
    }

    /// Runs until this time.
    pub fn run_until(&mut self, end: Duration) {
        loop {
            self.take_spawned();
            self.release();
            if let Some(id) = self.next() {
                self.poll(id);
                continue;
            }
            let mut state = self.sim.state();
            let Some((&(time, timer), _)) = state.timers.first_key_value() else { return };
            if time > end {
                state.now = end;
                return;
            }
            let waker = state.timers.remove(&(time, timer));
            state.now = state.now.max(time);
            drop(state);
            if let Some(waker) = waker {
                waker.wake();
            }
        }
    }

    fn take_spawned(&mut self) {
        let spawned = std::mem::take(&mut self.sim.state().spawned);
        let locals = std::mem::take(&mut *self.locals.0.borrow_mut());
        for (process, task) in spawned.into_iter().map(|(process, task)| (process, task as Local)).chain(locals) {
            self.tasks.push(Some((process, task)));
            self.sim.state().ready.push(self.tasks.len() - 1);
        }
    }

    /// Makes the held tasks of processes that go on ready.
    fn release(&mut self) {
        if self.held.is_empty() {
            return;
        }
        let mut state = self.sim.state();
        self.held.retain(|process, tasks| {
            let is_held = state.paused.contains(process) && !state.dead.contains(process);
            if !is_held {
                state.ready.append(tasks);
            }
            is_held
        });
    }

    fn next(&mut self) -> Option<usize> {
        let mut state = self.sim.state();
        if state.ready.is_empty() {
            return None;
        }
        let ready = state.ready.len();
        let index = state.dice.usize(0..ready);
        Some(state.ready.swap_remove(index))
    }

    fn poll(&mut self, id: usize) {
        let Some((process, mut task)) = self.tasks[id].take() else { return };
        let (is_dead, is_paused) = {
            let state = self.sim.state();
            (state.dead.contains(&process), state.paused.contains(&process))
        };
        if is_dead {
            return;
        }
        if is_paused {
            self.held.entry(process).or_default().push(id);
            self.tasks[id] = Some((process, task));
            return;
        }
        let waker = Waker::from(Arc::new(Task { sim: self.sim.clone(), id }));
        if task.as_mut().poll(&mut Context::from_waker(&waker)).is_pending() {
            self.tasks[id] = Some((process, task));
        }
    }
}
