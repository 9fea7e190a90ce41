//! Tasks beside the shards of a server: swaps, reloads, the following of a primary, housekeeping.

use std::sync::Arc;

use kvs_runtime::{Env, Task};
use tracing::error;

use super::prepare::shares_data;
use super::store::Store;
use crate::admin::{Admin, Phase};
use crate::follow;
use crate::guest::{Engine, Reload, Shards, Swapper};
use crate::memory;
use crate::settings::Serve;

pub struct Guests {
    pub shards: Arc<Shards>,
    pub swapper: Arc<Swapper>,
    housekeeping: Task,
    reloading: Task,
}

impl Guests {
    /// `inherits` is whether this process replaces one that serves.
    pub fn start(
        args: &Serve,
        engine: Engine,
        shards: Arc<Shards>,
        (store, inherits): (&Store, bool),
        reload: Reload,
        admin: &Admin,
        env: &Env,
    ) -> Self {
        let health = &admin.health;
        admin.metrics.add(shards.clone());
        health.set_guest(Arc::clone(&shards));
        let timed = Arc::clone(&shards);
        health.add("clock", move || timed.clock_condition());
        if args.spare {
            let spared = Arc::clone(&shards);
            health.add("spare", move || spared.spare_condition());
            shards.keep_spares(memory::size());
        }
        let data = (args.data_dir.clone(), shares_data(args));
        let swapper = Swapper::new(engine, Arc::clone(&shards), Arc::clone(&store.log), data, args.probation);
        admin.set_swapper(Arc::clone(&swapper));
        if shares_data(args) {
            let checked = Arc::clone(&swapper);
            health.add("guest of the primary", move || checked.condition());
        }
        let reloading = reload.start(Arc::clone(&swapper), env);
        health.reached(Phase::Serving);
        if let Some(followed) = store.followed.clone() {
            let checked = Arc::clone(&followed);
            health.add("replication", move || checked.condition());
            let (promoted, swapper) = (Arc::clone(&followed), Arc::clone(&swapper));
            let (changes, shards) = (Arc::clone(&store.changes), Arc::clone(&shards));
            let read_only = Arc::clone(&store.read_only);
            env.tasks.restart("follow", &env.clock, move || {
                follow::run(Arc::clone(&followed), Arc::clone(&changes), Arc::clone(&shards), Arc::clone(&read_only))
            });
            env.tasks.detach("takeover", async move {
                promoted.promoted().await;
                match swapper.differs() {
                    _ if inherits => swapper.record(),
                    Ok(Some(former)) => error!("took over with another guest than the primary had: that was {former}"),
                    Ok(None) => swapper.record(),
                    // The record stays: it may name another guest.
                    Err(error) => error!("took over without knowing the guest that the primary had: {error:#}"),
                }
            });
        }
        let kept = Arc::clone(&shards);
        let housekeeping = env.tasks.restart("housekeeping", &env.clock, move || {
            let kept = Arc::clone(&kept);
            async move { kept.keep_house().await }
        });
        Self { shards, swapper, housekeeping, reloading }
    }

    /// Ends what would change the log or the guest.
    pub fn abort(&self) {
        self.housekeeping.abort();
        self.reloading.abort();
    }
}
