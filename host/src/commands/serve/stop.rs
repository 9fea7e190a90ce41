//! Signals to stop.

use std::convert::Infallible;

use anyhow::Result;
use kvs_runtime::Env;
use tokio::signal::unix::{Signal, SignalKind};
use tokio::sync::watch;
use tracing::warn;

use crate::lines;
use crate::signals::listen as listen_for;

/// The request to stop: the first SIGTERM or SIGINT. The second one stops the process at once.
pub struct Stop(watch::Receiver<bool>);

impl Stop {
    pub fn on_signal(env: &Env) -> Result<Self> {
        let mut terminate = listen_for(SignalKind::terminate())?;
        let mut interrupt = listen_for(SignalKind::interrupt())?;
        let (stop, stopped) = watch::channel(false);
        env.tasks.restart("signals", &env.clock, move || {
            let (terminate, interrupt, stop) = (terminate(), interrupt(), stop.clone());
            async move { receive_signals(terminate?, interrupt?, &stop).await }
        });
        Ok(Self(stopped))
    }

    /// Returns the output of a future, or None if the process is to stop before.
    pub async fn or<T>(&mut self, future: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            output = future => Some(output),
            _ = self.0.changed() => None,
        }
    }

    pub fn signal(&self) -> watch::Receiver<bool> {
        self.0.clone()
    }
}

async fn receive_signals(
    mut terminate: Signal,
    mut interrupt: Signal,
    stop: &watch::Sender<bool>,
) -> Result<Infallible> {
    loop {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        if stop.send_replace(true) {
            // What was acknowledged is durable already.
            warn!("stopping at once");
            lines::end();
            std::process::exit(1);
        }
    }
}
