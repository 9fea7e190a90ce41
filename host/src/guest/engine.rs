//! The engine that compiles guests, and a compiled guest that instances are made of.
//!
//! Owns: what is checked before a guest may run, and the clock that ends its calls.
//! Must never know: requests, the state of a guest, why another one is wanted.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use wasmtime::component::{Component, Linker};

use super::clock::Clock;
use super::instance::{self, Instance, State};
use super::sandbox;
use crate::contract::ExportsPre;
use crate::log::TransactionLog;

/// The default guest, `guest/kvs`, built beside the host.
static DEFAULT_GUEST: &[u8] = include_bytes!(env!("KVS_DEFAULT_GUEST"));

/// The grain of CPU time limits: a call is ended this much late at most.
const EPOCH: Duration = Duration::from_millis(10);
/// Larger files are no guests. A whole JavaScript engine is 12 MiB.
const GUEST_BYTES: u64 = 256 << 20;

/// What a guest exports (`world store`).
const WANTED: [&str; 3] = ["kvs:store/lifecycle@0.1.0", "kvs:store/handler@0.1.0", "kvs:store/sharding@0.1.0"];

/// Limits of one instance.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// CPU time of one call.
    pub call: Duration,
    /// Of all linear memories.
    pub memory_bytes: usize,
    /// Of all tables.
    pub table_elements: usize,
    /// Core instances a component may be made of; as many memories, and as many tables.
    pub instances: usize,
    /// The largest value that comes in.
    pub value_bytes: usize,
    /// The largest body of a response.
    pub response_bytes: usize,
    /// How often one call may append.
    pub appends: u32,
    /// Output that becomes lines of the log, in a second.
    pub log_bytes: usize,
    /// A longer line is cut into lines of this many bytes.
    pub log_line_bytes: usize,
}

/// Compiles guests, and ends calls that take too long.
pub struct Engine {
    linker: Linker<State>,
    limits: Limits,
    clock: Arc<Clock>,
}

impl Engine {
    pub fn new(limits: Limits) -> Result<Self> {
        let mut config = wasmtime::Config::new();
        // A guest is called and returns; what wasmtime keeps for guests that are suspended triples the cost of a call.
        config.concurrency_support(false);
        config.epoch_interruption(true);
        let engine = wasmtime::Engine::new(&config).map_err(anyhow::Error::from);
        let engine = engine.context("guests cannot be run on this CPU or system")?;

        let mut linker = Linker::new(&engine);
        instance::add_to_linker(&mut linker)?;
        sandbox::add_to_linker(&mut linker, State::sandbox)?;

        let ticking = engine.weak();
        thread::Builder::new().name("epoch".into()).spawn(move || {
            while let Some(engine) = ticking.upgrade() {
                engine.increment_epoch();
                drop(engine);
                thread::sleep(EPOCH);
            }
        })?;
        Ok(Self { linker, limits, clock: Arc::default() })
    }

    /// Compiles the guest in `file`, or the default one, and checks that it fits the contract. `config` is what it will
    /// find in `wasi:config/store`.
    pub fn load(&self, file: Option<&Path>, config: Vec<(String, String)>) -> Result<Guest> {
        let exports = match file {
            Some(file) => {
                let refused = || format!("{} cannot be run as a guest", file.display());
                read(file).and_then(|bytes| self.check(&bytes)).with_context(refused)
            }
            None => self.check(DEFAULT_GUEST).context("the default guest cannot be run"),
        };
        Ok(Guest { exports: exports?, limits: self.limits, config: config.into(), clock: self.clock.clone() })
    }

    fn check(&self, bytes: &[u8]) -> Result<ExportsPre<State>> {
        match bytes.get(..8) {
            Some(b"\0asm\x0d\0\x01\0") => {}
            Some(b"\0asm\x01\0\0\0") => bail!("it is a core module, not a component; build it for wasm32-wasip2"),
            _ => bail!("it is not WebAssembly"),
        }
        let engine = self.linker.engine();
        let component = Component::from_binary(engine, bytes)?;
        let world = component.component_type();

        let refused = world.imports(engine).map(|(name, _)| name).filter(|name| !is_offered(name));
        let refused = refused.collect::<Vec<_>>().join(", ");
        ensure!(refused.is_empty(), "it imports {refused}, which this host does not offer");

        let missing = WANTED.into_iter().filter(|name| world.get_export(engine, name).is_none());
        let missing = missing.collect::<Vec<_>>().join(", ");
        ensure!(missing.is_empty(), "it does not export {missing}");

        Ok(self.linker.instantiate_pre(&component).and_then(ExportsPre::new)?)
    }
}

/// Whether an import, `namespace:package/interface@version`, is one of ours, in whatever version.
fn is_offered(import: &str) -> bool {
    let interface = import.split('@').next().unwrap_or(import);
    instance::OFFERED.contains(&interface) || sandbox::OFFERED.contains(&interface)
}

fn read(file: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(file)?.take(GUEST_BYTES + 1).read_to_end(&mut bytes)?;
    ensure!(bytes.len() as u64 <= GUEST_BYTES, "it is larger than {GUEST_BYTES} bytes");
    Ok(bytes)
}

/// A compiled guest that fits the contract.
pub struct Guest {
    exports: ExportsPre<State>,
    limits: Limits,
    config: Arc<[(String, String)]>,
    clock: Arc<Clock>,
}

impl Guest {
    /// A new instance, which has described itself and knows nothing yet. What it appends goes to `log`.
    pub fn instantiate(&self, log: Arc<dyn TransactionLog>) -> Result<Instance> {
        Instance::new(&self.exports, self.limits, State::new(log, self.config.clone(), self.limits, self.clock.clone()))
    }
}

/// The number of epochs after which a call has certainly had `limit`.
pub(super) fn epochs(limit: Duration) -> u64 {
    let epochs = limit.as_nanos().div_ceil(EPOCH.as_nanos());
    // The epoch in progress does not count: it may end at once.
    u64::try_from(epochs).unwrap_or(u64::MAX - 1) + 1
}
