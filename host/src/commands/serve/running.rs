//! A server that serves, up to its end.

use std::sync::Arc;

use anyhow::{Result, bail, ensure};
use kvs_runtime::Env;
use kvs_txlog::TransactionLog;
use tracing::{info, warn};

use super::Ended;
use super::guests::Guests;
use super::listeners::WhenPrimary;
use super::stop::Stop;
use super::store::Store;
use crate::admin::{Admin, Phase};
use crate::edge::Edge;
use crate::edge::listener::{Listener, Listeners, SocketFile};
use crate::settings::Serve;
use crate::systemd;
use crate::upgrade::{Control, Upgrader};

pub struct Running {
    /// The listeners are of the service manager.
    pub is_activated: bool,
    pub admin: Arc<Admin>,
    pub store: Store,
    pub guests: Guests,
    pub edge: Arc<Edge>,
    pub listeners: Vec<Arc<Listener>>,
    /// Addresses of the listeners, as log lines have them.
    pub addresses: String,
    pub when_primary: Arc<WhenPrimary>,
    pub inherited_when_primary: Option<Listener>,
    pub control: Arc<Control>,
    pub upgrader: Arc<Upgrader>,
}

impl Running {
    /// Serves until the process is to stop, another one serves, or the log fails.
    pub async fn until_stopped(self, args: &Serve, env: &Env, mut stop: Stop) -> Result<Ended> {
        let Self { admin, store, guests, listeners, addresses, control, upgrader, .. } = self;
        let second = self.when_primary.open(
            args.listen_when_primary,
            self.inherited_when_primary,
            store.followed.clone(),
            &env.clock,
        );
        // Those of an upgrade belong to the former process until then.
        let files: Vec<_> = listeners.iter().filter_map(|listener| listener.file()).collect();
        let mut handed_over = upgrader.handed_over.subscribe();
        let handed_over = async {
            // The sender is in the upgrader.
            let _ = handed_over.wait_for(|handed_over| *handed_over).await;
            admin.hand_over();
        };
        let mut failure = None;
        let stopped = async {
            failure = stop.or(store.log.watermark().latched()).await;
            admin.health.reached(Phase::Stopping);
            if failure.is_none() {
                info!("stopping: finishing requests in progress");
            }
            // Another process may serve, or take over from this one if its log has failed: then the service does not stop.
            if failure.is_none() && !*upgrader.handed_over.borrow() {
                systemd::stopping(env);
            }
            store.changes.end();
        };
        let cut_off = self.edge.serve(Listeners::new(listeners), second, handed_over, stopped).await;
        guests.abort();
        if cut_off > 0 {
            warn!("{cut_off} connections were cut off after {:?}", args.drain_timeout);
        }
        // An upgrade that was begun before the end, and its answer.
        let _upgraded = upgrader.alone.lock().await;
        let _answered = upgrader.answering.write().await;
        if let Some(reason) = failure {
            return failed(&reason, args, &*store.log, self.is_activated);
        }
        if !*upgrader.handed_over.borrow() {
            control.remove();
            files.into_iter().for_each(SocketFile::remove);
        }
        store.log.close()?;
        let guest = guests.shards.serving().description;
        let sequence = store.log.appended();
        info!(data = %args.data_dir.display(), guest = guest.name, sequence, "stopped serving on {addresses}");
        Ok(Ended::Stopped)
    }
}

/// Ends after a failure of the log: as a standby, if another process writes it.
fn failed(reason: &str, args: &Serve, log: &dyn TransactionLog, is_activated: bool) -> Result<Ended> {
    if !(args.standby && log.read_only().is_some()) {
        bail!("{reason}; start again to recover what was acknowledged");
    }
    ensure!(
        !is_activated,
        "{reason}; ending, since only the service manager can open the listeners again: start this server as a standby"
    );
    warn!("{reason}: restarting as a standby");
    Ok(Ended::Deposed)
}
