//! Settings that can fail before there is a log, for `kvs serve` and its `--check`.

use std::sync::Arc;

use anyhow::Result;
use kvs_runtime::Env;
use tracing::warn;

use super::check::{inflight_bytes, too_large_with_spares};
use super::listeners::{distinct, exposed};
use crate::descriptors;
use crate::edge;
use crate::edge::auth::Tokens;
use crate::edge::budget::Budget;
use crate::edge::tls::Tls;
use crate::guest::Reload;
use crate::memory;
use crate::settings::{Serve, TxlogStorage};

pub struct Prepared {
    pub reload: Reload,
    pub tls: Option<Arc<Tls>>,
    pub tokens: Option<Arc<Tokens>>,
    /// Warnings for listeners that are open to a network by intent.
    pub exposures: Vec<String>,
    /// Maximum number of connections.
    pub connections: usize,
    pub budget: Arc<Budget>,
}

impl Prepared {
    pub fn new(args: &Serve, env: &Env) -> Result<Self> {
        let primary = shares_data(args).then_some(&*args.data_dir);
        let reload = Reload::new(args.guest.file.as_deref(), args.watch_guest, primary)?;
        let tls = args.tls.files().map(|files| edge::tls::load(files, env.clock.clone())).transpose()?;
        let tokens = args.access.tokens.as_deref();
        let tokens = tokens.map(|file| edge::auth::load(file, env.clock.clone())).transpose()?;
        let exposures = exposed(args)?;
        distinct(args)?;
        if let Some(excess) = too_large_with_spares(args, memory::size()) {
            warn!("{excess}");
        }
        let connections = descriptors::connections(args.max_connections)?;
        let budget = Budget::new(inflight_bytes(args)?);
        Ok(Self { reload, tls, tokens, exposures, connections, budget })
    }
}

/// Returns whether another server may write to the same data directory.
pub fn shares_data(args: &Serve) -> bool {
    args.standby && matches!(args.txlog, TxlogStorage::File)
}
