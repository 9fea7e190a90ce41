//! Checks of the settings against each other and against the machine.

use anyhow::{Result, ensure};
use bytesize::ByteSize;
use kvs_runtime::Env;
use tracing::info;

use super::listeners;
use super::store::file_options;
use crate::guest::{Engine, Source};
use crate::memory;
use crate::settings::{Serve, TxlogStorage};

/// The share of the memory that requests and responses in flight may take, and what they may take in any case.
const MEMORY_SHARE: u64 = 8;
const LEAST_INFLIGHT: u64 = 64 << 20;

/// Checks the settings that are used only when the server has begun, and the guest.
pub fn check(args: &Serve, env: &Env) -> Result<()> {
    let data = &args.data_dir;
    ensure!(data.is_dir() || !data.exists(), "--data-dir {} is not a directory; give another", data.display());
    listeners::check(args)?;
    match &args.txlog {
        TxlogStorage::File => file_options(args, None, env.clone()).check()?,
        TxlogStorage::Postgres(url) => url.check()?,
        #[cfg(feature = "nats")]
        TxlogStorage::Nats(url) => url.check()?,
    }
    let limits = args.guest.limits(args.max_value_bytes, args.shards)?;
    let engine = Engine::new(limits, args.guest.guest_config.clone(), None, 0, env)?;
    engine.load(Source::choose(args.guest.file.as_deref(), &args.data_dir))?;
    info!("the settings are valid");
    Ok(())
}

/// What clients may hold in memory: as configured, or a share of what there is. Never so little that no value fits.
pub fn inflight_bytes(args: &Serve) -> Result<usize> {
    let least = 2 * args.max_value_bytes.as_u64();
    let Some(configured) = args.max_inflight_bytes else {
        return Ok(usize::try_from((memory::size() / MEMORY_SHARE).max(LEAST_INFLIGHT).max(least))?);
    };
    ensure!(
        configured.as_u64() >= least,
        "--max-inflight-bytes {configured} is less than twice --max-value-bytes {}; give at least that",
        args.max_value_bytes
    );
    Ok(usize::try_from(configured.as_u64())?)
}

/// The warning that the instances and their spares, of which each may grow to its limit, do not fit into the memory.
pub fn too_large_with_spares(args: &Serve, memory: u64) -> Option<String> {
    let (limit, instances) = (args.guest.memory_limit(memory, args.shards), 2 * u64::from(args.shards));
    let most = limit.as_u64().saturating_mul(instances);
    (args.spare && most > memory).then(|| {
        format!(
            "with --spare {instances} instances may take {} together, and the memory is {}: when the spares do not fit they \
             are left out; a lower --guest-max-memory-bytes, now {limit}, refuses data before",
            ByteSize(most),
            ByteSize(memory)
        )
    })
}
