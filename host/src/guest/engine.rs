//! The engine that compiles guests, and a compiled guest that instances are made of.
//!
//! Owns: what is checked before a guest may run.
//! Must never know: requests, the state of a guest, why another one is wanted.

use std::collections::BTreeSet;
use std::env::consts::ARCH;
use std::path::Path;
use std::sync::Arc;
#[cfg(feature = "compiler")]
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, bail, ensure};
use kvs_runtime::Env;
#[cfg(feature = "compiler")]
use tracing::warn;
use wasmtime::component::{Component, Linker};

use super::absent;
use super::cache::ResponseCache;
use super::clock::Clock;
use super::compiled;
use super::compiler::Compiler;
use super::custom::CustomMetrics;
use super::epoch;
use super::huge_pages;
use super::imports::{self, Common, State};
use super::instance::Instance;
use super::limits::Limits;
use super::owner::Part;
use super::quota::Quotas;
use super::sandbox;
use super::source::{Digest, Source};
use crate::contract::{ExportsPre, PACKAGE, VERSION};
use kvs_txlog::TransactionLog;

/// Exports of every guest (`world store`).
const WANTED: [&str; 2] = ["kvs:store/lifecycle", "kvs:store/handler"];
/// Export of a guest that runs in several shards (`world sharded-store`).
pub const SHARDING: &str = "kvs:store/sharding";

/// Compiles guests.
pub struct Engine {
    linker: Linker<State>,
    /// What all guests share, and the metrics of none.
    common: Common,
    compiler: Compiler,
    /// How many guests were made.
    guests: AtomicU64,
}

impl Engine {
    /// Every guest finds `config` in `wasi:config/store`. What [`keep`](Self::keep) stores is in the directory
    /// `cache`; responses that can be reused take `response_cache_bytes`.
    pub fn new(
        limits: Limits,
        config: Vec<(String, String)>,
        cache: Option<&Path>,
        response_cache_bytes: u64,
        env: &Env,
    ) -> Result<Self> {
        Self::with_clock(limits, config, cache, response_cache_bytes, env, Clock::new(env.clone()))
    }

    /// The same, with a clock and randomness for the guests that are not those of the engine.
    pub fn with_clock(
        limits: Limits,
        config: Vec<(String, String)>,
        cache: Option<&Path>,
        response_cache_bytes: u64,
        env: &Env,
        clock: Clock,
    ) -> Result<Self> {
        let engine = wasmtime::Engine::new(&settings(Cpu::This)?).map_err(anyhow::Error::from);
        let engine = engine.context("guests cannot be run on this CPU or system")?;

        let mut linker = Linker::new(&engine);
        imports::add_to_linker(&mut linker)?;
        sandbox::add_to_linker(&mut linker, State::sandbox)?;

        epoch::tick(engine.weak(), env)?;
        let total_memory = Arc::default();
        huge_pages::join(Arc::downgrade(&total_memory), env)?;
        let clock = Arc::new(clock);
        let common = Common {
            config: config.into(),
            limits,
            cache: ResponseCache::new(response_cache_bytes, Arc::clone(&clock), &clock.env().random)?,
            clock,
            total_memory,
            metrics: Arc::new(CustomMetrics::new(limits.metrics, Arc::default())),
            quotas: Quotas::new(&env.random)?,
        };
        Ok(Self { linker, common, compiler: Compiler::new(cache), guests: AtomicU64::default() })
    }

    /// Reads and compiles a guest, and checks that it fits the contract.
    pub fn load(&self, source: Source) -> Result<Guest> {
        let loaded = source.read().and_then(|bytes| self.compile(source.clone(), &bytes));
        loaded.with_context(|| source.cannot_be_run())
    }

    /// Compiles a component, which came from `source`, and checks that it fits the contract.
    pub fn compile(&self, source: Source, bytes: &[u8]) -> Result<Guest> {
        let is_sent = source == Source::Sent;
        ensure!(
            !(is_sent && bytes.starts_with(compiled::MARK)),
            "it is compiled, and taken only from disk: send the component"
        );
        let (component, is_kept) = component(&self.compiler, self.linker.engine(), bytes)?;
        let world = self.world(&component);
        if let Some(misfit) = world.misfit() {
            bail!(misfit);
        }
        let mut linker = self.linker.clone();
        absent::add_to_linker(&mut linker, &component, State::handles)?;
        let instance = linker.instantiate_pre(&component)?;
        let exports = Arc::new(ExportsPre::new(instance, world.is_sharded())?);
        let Common { limits, metrics, .. } = &self.common;
        let metrics = Arc::new(CustomMetrics::new(limits.metrics, Arc::clone(metrics.exceeded())));
        let common = Common { metrics, ..self.common.clone() };
        let (digest, number) = (Digest::of(bytes), self.guests.fetch_add(1, Ordering::Relaxed));
        Ok(Guest { exports, source, digest, number, is_kept, common })
    }

    /// Makes the next start with this guest a quick one. For guests that have proved themselves: what is turned away
    /// leaves nothing behind.
    pub fn keep(&self, guest: &Guest) {
        if !guest.is_kept {
            self.compiler.keep(self.linker.engine(), &guest.digest, guest.exports.instance().component());
        }
    }

    /// Compiles a component, whatever it imports and exports.
    pub fn component(&self, bytes: &[u8]) -> Result<Component> {
        component(&self.compiler, self.linker.engine(), bytes).map(|(component, _)| component)
    }

    pub fn world(&self, component: &Component) -> World {
        World::of(self.linker.engine(), component)
    }
}

/// Which CPUs a guest is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cpu {
    /// This one, and those that can do all that it can.
    This,
    /// Every one of its kind.
    Any,
}

/// How guests are compiled and run.
pub fn settings(cpu: Cpu) -> Result<wasmtime::Config> {
    let mut settings = wasmtime::Config::new();
    // A guest is called and returns; what wasmtime keeps for guests that are suspended triples the cost of a call.
    settings.concurrency_support(false);
    settings.epoch_interruption(true);
    // The log line of a trap has the names of functions, no more; wasmtime finds those without these tables.
    settings.generate_address_map(false).native_unwind_info(false);
    #[cfg(feature = "compiler")]
    settings.parallel_compilation(has_compiling_threads());
    if cpu == Cpu::Any {
        // Named, a target has no more than all its CPUs have. What is compiled for one libc runs beside the other.
        let libc = if cfg!(target_env = "musl") { "musl" } else { "gnu" };
        settings.target(&format!("{ARCH}-unknown-linux-{libc}"))?;
    }
    Ok(settings)
}

/// Starts the threads that compile, before the system may refuse them (the limit of a container): wasmtime would start them for
/// the first guest that is not cached, and panic. Returns false where it refuses them already; then one thread compiles.
#[cfg(feature = "compiler")]
fn has_compiling_threads() -> bool {
    static STARTED: LazyLock<bool> = LazyLock::new(|| {
        let threads = rayon::ThreadPoolBuilder::new().thread_name(|number| format!("compile {number}"));
        let started = threads.build_global();
        started.inspect_err(|error| warn!("one thread compiles guests, slowly: {error}")).is_ok()
    });
    *STARTED
}

/// The component in these bytes, compiled now or before, whatever it imports and exports; true when it is on disk compiled.
pub fn component(compiler: &Compiler, engine: &wasmtime::Engine, bytes: &[u8]) -> Result<(Component, bool)> {
    match bytes.get(..8) {
        Some(b"\0asm\x0d\0\x01\0") => compiler.compile(engine, bytes),
        Some(b"\0asm\x01\0\0\0") => bail!("it is a core module, not a component; build it for wasm32-wasip2"),
        Some(mark) if mark == compiled::MARK => Ok((compiled::open(engine, bytes)?, true)),
        _ => bail!("it is not WebAssembly"),
    }
}

/// What a component wants of its host and gives to it: names as `namespace:package/interface@version`.
pub struct World {
    pub imports: Vec<String>,
    pub exports: Vec<String>,
}

impl World {
    pub fn of(engine: &wasmtime::Engine, component: &Component) -> Self {
        let world = component.component_type();
        let imports = world.imports(engine).map(|(name, _)| name.to_owned()).collect();
        let exports = world.exports(engine).map(|(name, _)| name.to_owned()).collect();
        Self { imports, exports }
    }

    /// Whether it can run in several shards.
    pub fn is_sharded(&self) -> bool {
        self.exports.iter().any(|name| is_current(name, SHARDING))
    }

    /// Versions of the contract that it was built for: one, unless it fits no host.
    pub fn contracts(&self) -> Vec<String> {
        let names = self.imports.iter().chain(&self.exports);
        let versions: BTreeSet<_> = names.filter_map(|name| Some(of_contract(name)?.split_once('@')?.1)).collect();
        versions.into_iter().map(|version| format!("{PACKAGE}@{version}")).collect()
    }

    /// Interfaces of the contract that it calls, without those that have types only.
    pub fn used(&self) -> Vec<String> {
        let interfaces = self.imports.iter().filter_map(|name| of_contract(name)).map(interface);
        interfaces.filter(|interface| *interface != "http").map(str::to_owned).collect()
    }

    /// Why it does not fit the contract: the version of it that it was built for, every import that is not offered, and
    /// every export that is missing.
    pub fn misfit(&self) -> Option<String> {
        let others: BTreeSet<_> =
            self.imports.iter().chain(&self.exports).filter_map(|name| other_version(name)).collect();
        let others: Vec<_> = others.into_iter().map(|version| format!("{PACKAGE}@{version}")).collect();
        let refused: Vec<_> = self.imports.iter().filter(|name| !is_offered(name)).map(String::as_str).collect();
        // What is there in another version is not missing.
        let exports = |wanted: &str| {
            self.exports
                .iter()
                .any(|name| is_current(name, wanted) || other_version(name).is_some() && interface(name) == wanted)
        };
        let missing: Vec<_> =
            WANTED.iter().filter(|wanted| !exports(wanted)).map(|wanted| format!("{wanted}@{VERSION}")).collect();
        let built = (!others.is_empty()).then(|| {
            let others = others.join(" and ");
            format!("it was built for {others}, and this host runs {PACKAGE}@{VERSION}: build it again with the WIT of this version")
        });
        let refused =
            (!refused.is_empty()).then(|| format!("it imports {}, which this host does not offer", refused.join(", ")));
        let missing = (!missing.is_empty()).then(|| format!("it does not export {}", missing.join(", ")));
        let reasons: Vec<_> = built.into_iter().chain(refused).chain(missing).collect();
        (!reasons.is_empty()).then(|| reasons.join("; "))
    }
}

/// Whether this host offers an import. One of another version of the contract is not named as well: see [`World::misfit`].
fn is_offered(import: &str) -> bool {
    let interface = interface(import);
    // The linker checks the versions of WASI.
    other_version(import).is_some()
        || imports::OFFERED.contains(&interface)
        || sandbox::OFFERED.contains(&interface)
        || absent::is_absent(import)
}

/// The name of an interface of the contract without its package.
fn of_contract(name: &str) -> Option<&str> {
    name.strip_prefix(PACKAGE)?.strip_prefix('/')
}

/// The version in the name of an interface of the contract, when it is not the one that this host runs.
fn other_version(name: &str) -> Option<&str> {
    let (_, version) = of_contract(name)?.split_once('@')?;
    (version != VERSION).then_some(version)
}

/// Whether this is the name of an interface of the contract in the version that this host runs.
fn is_current(name: &str, interface: &str) -> bool {
    name.strip_prefix(interface).and_then(|rest| rest.strip_prefix('@')) == Some(VERSION)
}

/// A name without its version.
fn interface(name: &str) -> &str {
    name.split('@').next().unwrap_or(name)
}

/// A compiled guest that fits the contract.
pub struct Guest {
    exports: Arc<ExportsPre<State>>,
    source: Source,
    digest: Digest,
    number: u64,
    /// Whether it is on disk compiled.
    is_kept: bool,
    common: Common,
}

impl Guest {
    pub fn limits(&self) -> &Limits {
        &self.common.limits
    }

    /// The metrics that it defines.
    pub fn metrics(&self) -> &CustomMetrics {
        &self.common.metrics
    }

    /// Linear memory of the instances of all guests of its engine: of this one, of others in a swap, of spares and routers.
    pub fn total_memory_bytes(&self) -> u64 {
        self.common.total_memory.load(Ordering::Relaxed)
    }

    pub fn source(&self) -> &Source {
        &self.source
    }

    /// Whether it can run in several shards.
    pub fn is_sharded(&self) -> bool {
        self.exports.is_sharded()
    }

    pub fn digest(&self) -> &Digest {
        &self.digest
    }

    /// What its instances are given from outside.
    pub fn env(&self) -> &Env {
        self.common.clock.env()
    }

    /// The time that its instances receive.
    pub fn clock(&self) -> &Clock {
        &self.common.clock
    }

    /// Where its responses are kept.
    pub fn response_cache(&self) -> &Arc<ResponseCache> {
        &self.common.cache
    }

    pub fn quotas(&self) -> &Arc<Quotas> {
        &self.common.quotas
    }

    /// Another for each guest, the same for all its instances.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// A new instance, which has described itself and knows nothing yet. What it appends goes to `log`, when the keys are
    /// its part.
    pub fn instantiate(&self, log: Arc<dyn TransactionLog>, part: Part) -> Result<Instance> {
        self.instances(log, part)()
    }

    /// What makes such instances, also when the guest is gone.
    pub fn instances(
        &self,
        log: Arc<dyn TransactionLog>,
        part: Part,
    ) -> impl Fn() -> Result<Instance> + Send + 'static {
        let (exports, number, common) = (Arc::clone(&self.exports), self.number, self.common.clone());
        move || {
            let state = State::new(Arc::clone(&log), part.clone(), common.clone());
            Instance::new(&exports, number, common.limits, state)
        }
    }
}
