use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;

use kvs_metrics::Metrics;

use super::*;

/// Makes a task panic at its first starts.
struct Saboteur {
    left: AtomicU32,
}

impl Spawn for Saboteur {
    fn thread(&self, name: &str, work: BoxedWork) -> io::Result<()> {
        std::thread::Builder::new().name(name.into()).spawn(work).map(drop)
    }

    fn task(&self, _name: &str, task: BoxedTask) {
        tokio::spawn(task);
    }

    fn begins(&self, name: &str) {
        let left = self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
        assert!(left.is_err(), "sabotage of {name}");
    }
}

fn sabotaged(times: u32) -> Tasks {
    Tasks::given(Arc::new(Saboteur { left: times.into() }))
}

#[tokio::test]
async fn restarting_task_survives_panics_and_errors() {
    let tasks = sabotaged(1);
    let mut runs = 0;
    let (done, over) = oneshot();
    let mut done = Some(done);
    let task = tasks.restart("sweep", &Clock::system(), move || {
        runs += 1;
        let done = (runs > 1).then(|| done.take()).flatten();
        async move { done.ok_or_else(|| anyhow!("not yet")).map(|done| done.send(()).unwrap()) }
    });
    over.await.unwrap();
    task.ended().await;
    assert_eq!((tasks.restarts("sweep"), tasks.condition()), (2, None));
    let metrics = Metrics::default();
    metrics.add(Arc::new(tasks));
    assert!(metrics.text().contains("kvs_task_restarts_total{task=\"sweep\"} 2\n"), "{}", metrics.text());
}

#[tokio::test]
async fn pending_restart_is_reported_in_condition() {
    let tasks = sabotaged(1);
    let task = tasks.restart("sweep", &Clock::system(), std::future::pending::<Result<()>>);
    while tasks.restarts("sweep") == 0 {
        tokio::task::yield_now().await;
    }
    let condition = tasks.condition().unwrap();
    assert!(condition.contains("`sweep`") && condition.contains("sabotage of sweep"), "{condition}");
    // An aborted task is not reported.
    task.abort();
    task.ended().await;
    assert_eq!(tasks.condition(), None);
}

#[tokio::test]
async fn failing_task_passes_panic_to_callback() {
    let (failed, reason) = oneshot();
    let failed = move |error: &Error| failed.send(format!("{error:#}")).unwrap();
    sabotaged(1).fail("writer", async { Ok(()) }, failed);
    assert_eq!(reason.await.unwrap(), "the task `writer` ended: it panicked: sabotage of writer");
    let (failed, reason) = oneshot();
    let failed = move |error: &Error| failed.send(format!("{error:#}")).unwrap();
    sabotaged(0).fail("writer", async { Err(anyhow!("no disk")) }, failed);
    assert_eq!(reason.await.unwrap(), "the task `writer` ended: no disk");
    // Success does not call it.
    let task = sabotaged(0).fail("writer", async { Ok(()) }, |error| panic!("{error:#}"));
    task.ended().await;
}

#[tokio::test]
async fn detached_task_panics_are_counted() {
    for tasks in [Tasks::system(), Tasks::system().in_runtime(&Handle::current())] {
        tasks.detach("connection", async {});
        tasks.detach("connection", async { panic!("half-way") });
        while tasks.panics("connection") == 0 {
            tokio::task::yield_now().await;
        }
        assert_eq!((tasks.panics("connection"), tasks.restarts("connection")), (1, 0));
    }
}

#[test]
fn aborted_detached_task_counts_no_panic() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let tasks = Tasks::system();
    runtime.block_on(async { tasks.detach("connection", std::future::pending()) });
    drop(runtime);
    assert_eq!(tasks.panics("connection"), 0);
}

#[test]
fn restarting_thread_survives_a_panic() {
    let tasks = sabotaged(2);
    let (ran, runs) = mpsc::channel();
    let thread = tasks.restart_thread("epoch", &Clock::system(), move || Ok(ran.send(())?)).unwrap();
    thread.join();
    assert_eq!((runs.iter().count(), tasks.restarts("epoch")), (1, 2));
}

#[test]
fn failing_thread_passes_panic_to_callback() {
    let (failed, reason) = mpsc::channel();
    let failed = move |error: &Error| failed.send(format!("{error:#}")).unwrap();
    sabotaged(1).fail_thread("log writer", || Ok(()), failed).unwrap().join();
    assert_eq!(reason.recv().unwrap(), "it panicked: sabotage of log writer");
}

#[test]
fn joined_thread_has_ended() {
    let tasks = Tasks::system();
    let thread = tasks.detach_thread("closing", || panic!("half-way")).unwrap();
    thread.join();
    assert_eq!(tasks.panics("closing"), 1);
}

#[test]
fn backoff_doubles_and_resets() {
    let mut backoff = Backoff::default();
    let pauses: Vec<_> = (0..9).map(|_| backoff.next(Duration::ZERO).as_millis()).collect();
    assert_eq!(pauses, [50, 100, 200, 400, 800, 1_600, 3_200, 5_000, 5_000]);
    assert_eq!(backoff.next(BACKOFF_RESET), BACKOFF.0);
}

fn oneshot<T>() -> (tokio::sync::oneshot::Sender<T>, tokio::sync::oneshot::Receiver<T>) {
    tokio::sync::oneshot::channel()
}
