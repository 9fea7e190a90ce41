//! The part of WASI 0.2 that a guest finds (`wit/sandbox.wit`): enough for the standard libraries of most languages to
//! start, and nothing that reaches outside.
//!
//! Written here rather than taken from wasmtime-wasi, because that one waits: its plain calls block on a tokio runtime,
//! which panics inside one, and its asynchronous calls move every guest call onto a stack of its own. Here nothing ever
//! waits: output is always taken, input is always at its end, and a guest that wants to sleep is trapped.
//!
//! Owns: streams and handles. Must never know: the log, requests, the real environment.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hyper::header::HeaderValue;
use kvs_runtime::Env;
use wasmtime::component::{HasSelf, Linker, Resource, ResourceTable};
use wasmtime::{Result, bail, ensure};

use super::clock::Clock;
use super::fixed::Fixed;
use super::limits::Limits;
use super::metrics::LimitExceeded;
use super::output::Lines;
use super::shadow::{Inputs, Surroundings};

mod bindings {
    wasmtime::component::bindgen!({
        path: "../wit",
        world: "sandbox",
        imports: { default: trappable },
        with: {
            "wasi:io/error.error": super::Failure,
            "wasi:io/poll.pollable": super::Pollable,
            "wasi:io/streams.input-stream": super::Input,
            "wasi:io/streams.output-stream": super::Output,
            "wasi:cli/terminal-input.terminal-input": super::Never,
            "wasi:cli/terminal-output.terminal-output": super::Never,
        },
    });
}

use bindings::wasi::io::streams::StreamError;
use bindings::wasi::{cli, clocks, io, random};

/// The interfaces of `world sandbox`.
pub const OFFERED: [&str; 18] = [
    "wasi:cli/environment",
    "wasi:cli/exit",
    "wasi:cli/stdin",
    "wasi:cli/stdout",
    "wasi:cli/stderr",
    "wasi:cli/terminal-input",
    "wasi:cli/terminal-output",
    "wasi:cli/terminal-stdin",
    "wasi:cli/terminal-stdout",
    "wasi:cli/terminal-stderr",
    "wasi:clocks/monotonic-clock",
    "wasi:clocks/wall-clock",
    "wasi:io/error",
    "wasi:io/poll",
    "wasi:io/streams",
    "wasi:random/random",
    "wasi:random/insecure",
    "wasi:random/insecure-seed",
];

/// Handles a guest may hold at once. Each costs the host a few dozen bytes.
const HANDLES: usize = 1_000;
/// What one `write` may carry; the guest asks before it writes.
const WRITE_BYTES: u64 = 4 << 10;
/// Random bytes given in one call.
const RANDOM_BYTES: u64 = 64 << 10;

pub struct Sandbox {
    handles: ResourceTable,
    lines: Lines,
    started: Instant,
    env: Env,
    /// The time that the guest receives elsewhere, too.
    clock: Arc<Clock>,
    /// In `apply`: clocks stand, and randomness is the fixed stream.
    in_apply: bool,
    fixed: Fixed,
    /// Whether the call in progress, or the last one, read a clock or randomness.
    has_read: bool,
    /// What it reads of them.
    surroundings: Surroundings,
}

/// No operation here fails in a way that has more to say, so no guest ever holds one.
pub enum Failure {}
/// There is no terminal, so no guest ever holds one.
pub enum Never {}
/// Standard input: always at its end.
pub struct Input;
/// Standard output and standard error: both are lines of the host's log.
pub struct Output;
pub struct Pollable {
    ready: bool,
}

impl Sandbox {
    pub fn new(limits: Limits, exceeded: Arc<LimitExceeded>, clock: Arc<Clock>) -> Self {
        let mut handles = ResourceTable::new();
        handles.set_max_capacity(HANDLES);
        let env = clock.env().clone();
        Self {
            handles,
            lines: Lines::new(limits, exceeded, env.clock.clone()),
            started: env.clock.now(),
            env,
            clock,
            in_apply: false,
            fixed: Fixed::default(),
            has_read: false,
            surroundings: Surroundings::default(),
        }
    }

    /// Handles of the guest, whose number is limited.
    pub fn handles(&mut self) -> &mut ResourceTable {
        &mut self.handles
    }

    /// Log lines of the guest.
    pub fn lines(&mut self) -> &mut Lines {
        &mut self.lines
    }

    /// A call begins, for a request where there is one.
    pub fn begin_call(&mut self, request_id: Option<HeaderValue>, surroundings: Surroundings) {
        self.has_read = false;
        self.surroundings = surroundings;
        self.lines.begin_call(request_id);
    }

    /// Whether the call read a clock or randomness.
    pub fn has_read_surroundings(&self) -> bool {
        self.has_read
    }

    /// Returns what the last call was given of clocks and randomness, where that was recorded.
    pub fn recorded(&mut self) -> Inputs {
        match std::mem::take(&mut self.surroundings) {
            Surroundings::Recorded(given) => given,
            Surroundings::Real | Surroundings::Scripted(_) => Inputs::default(),
        }
    }

    /// A call of `apply` begins.
    pub fn begin_apply(&mut self) {
        self.in_apply = true;
    }

    /// The call is over: an unfinished line is one now.
    pub fn end_call(&mut self) {
        self.in_apply = false;
        self.lines.flush();
    }

    fn new_pollable(&mut self, ready: bool) -> Result<Resource<Pollable>> {
        Ok(self.handles.push(Pollable { ready })?)
    }
}

/// Offers everything in this file to the guests of `linker`.
pub fn add_to_linker<T: 'static>(linker: &mut Linker<T>, sandbox: fn(&mut T) -> &mut Sandbox) -> Result<()> {
    bindings::Sandbox::add_to_linker::<_, HasSelf<Sandbox>>(linker, sandbox)
}

fn no_waiting<T>() -> Result<T> {
    bail!("a guest may not wait: it would keep every other request waiting")
}

impl cli::environment::Host for Sandbox {
    fn get_environment(&mut self) -> Result<Vec<(String, String)>> {
        Ok(Vec::new())
    }
    fn get_arguments(&mut self) -> Result<Vec<String>> {
        Ok(Vec::new())
    }
    fn initial_cwd(&mut self) -> Result<Option<String>> {
        Ok(None)
    }
}

impl cli::exit::Host for Sandbox {
    fn exit(&mut self, status: std::result::Result<(), ()>) -> Result<()> {
        bail!("the guest called exit ({})", if status.is_ok() { "success" } else { "failure" })
    }
    fn exit_with_code(&mut self, code: u8) -> Result<()> {
        bail!("the guest called exit ({code})")
    }
}

impl cli::stdin::Host for Sandbox {
    fn get_stdin(&mut self) -> Result<Resource<Input>> {
        Ok(self.handles.push(Input)?)
    }
}

impl cli::stdout::Host for Sandbox {
    fn get_stdout(&mut self) -> Result<Resource<Output>> {
        Ok(self.handles.push(Output)?)
    }
}

impl cli::stderr::Host for Sandbox {
    fn get_stderr(&mut self) -> Result<Resource<Output>> {
        Ok(self.handles.push(Output)?)
    }
}

impl cli::terminal_stdin::Host for Sandbox {
    fn get_terminal_stdin(&mut self) -> Result<Option<Resource<Never>>> {
        Ok(None)
    }
}

impl cli::terminal_stdout::Host for Sandbox {
    fn get_terminal_stdout(&mut self) -> Result<Option<Resource<Never>>> {
        Ok(None)
    }
}

impl cli::terminal_stderr::Host for Sandbox {
    fn get_terminal_stderr(&mut self) -> Result<Option<Resource<Never>>> {
        Ok(None)
    }
}

impl cli::terminal_input::Host for Sandbox {}
impl cli::terminal_input::HostTerminalInput for Sandbox {
    fn drop(&mut self, handle: Resource<Never>) -> Result<()> {
        self.handles.delete(handle)?;
        Ok(())
    }
}

impl cli::terminal_output::Host for Sandbox {}
impl cli::terminal_output::HostTerminalOutput for Sandbox {
    fn drop(&mut self, handle: Resource<Never>) -> Result<()> {
        self.handles.delete(handle)?;
        Ok(())
    }
}

impl io::error::Host for Sandbox {}
impl io::error::HostError for Sandbox {
    fn to_debug_string(&mut self, handle: Resource<Failure>) -> Result<String> {
        match *self.handles.get(&handle)? {}
    }
    fn drop(&mut self, handle: Resource<Failure>) -> Result<()> {
        self.handles.delete(handle)?;
        Ok(())
    }
}

impl io::poll::Host for Sandbox {
    fn poll(&mut self, handles: Vec<Resource<Pollable>>) -> Result<Vec<u32>> {
        ensure!(!handles.is_empty(), "poll of nothing");
        let mut ready = Vec::new();
        for (index, handle) in (0..).zip(&handles) {
            if self.handles.get(handle)?.ready {
                ready.push(index);
            }
        }
        if ready.is_empty() { no_waiting() } else { Ok(ready) }
    }
}

impl io::poll::HostPollable for Sandbox {
    fn ready(&mut self, handle: Resource<Pollable>) -> Result<bool> {
        Ok(self.handles.get(&handle)?.ready)
    }
    fn block(&mut self, handle: Resource<Pollable>) -> Result<()> {
        if self.handles.get(&handle)?.ready { Ok(()) } else { no_waiting() }
    }
    fn drop(&mut self, handle: Resource<Pollable>) -> Result<()> {
        self.handles.delete(handle)?;
        Ok(())
    }
}

/// Result of an operation on a stream: a trap, an error for the guest, or success.
type Streamed<T> = Result<std::result::Result<T, StreamError>>;

impl io::streams::Host for Sandbox {}
impl io::streams::HostInputStream for Sandbox {
    fn read(&mut self, _: Resource<Input>, _: u64) -> Streamed<Vec<u8>> {
        Ok(Err(StreamError::Closed))
    }
    fn blocking_read(&mut self, _: Resource<Input>, _: u64) -> Streamed<Vec<u8>> {
        Ok(Err(StreamError::Closed))
    }
    fn skip(&mut self, _: Resource<Input>, _: u64) -> Streamed<u64> {
        Ok(Err(StreamError::Closed))
    }
    fn blocking_skip(&mut self, _: Resource<Input>, _: u64) -> Streamed<u64> {
        Ok(Err(StreamError::Closed))
    }
    fn subscribe(&mut self, _: Resource<Input>) -> Result<Resource<Pollable>> {
        self.new_pollable(true)
    }
    fn drop(&mut self, handle: Resource<Input>) -> Result<()> {
        self.handles.delete(handle)?;
        Ok(())
    }
}

impl io::streams::HostOutputStream for Sandbox {
    fn check_write(&mut self, _: Resource<Output>) -> Streamed<u64> {
        Ok(Ok(WRITE_BYTES))
    }
    fn write(&mut self, _: Resource<Output>, contents: Vec<u8>) -> Streamed<()> {
        let len = contents.len();
        ensure!(len as u64 <= WRITE_BYTES, "a write of {len} bytes, when {WRITE_BYTES} were allowed");
        self.lines.print(&contents);
        Ok(Ok(()))
    }
    fn blocking_write_and_flush(&mut self, handle: Resource<Output>, contents: Vec<u8>) -> Streamed<()> {
        self.write(handle, contents)
    }
    fn flush(&mut self, _: Resource<Output>) -> Streamed<()> {
        Ok(Ok(()))
    }
    fn blocking_flush(&mut self, _: Resource<Output>) -> Streamed<()> {
        Ok(Ok(()))
    }
    fn subscribe(&mut self, _: Resource<Output>) -> Result<Resource<Pollable>> {
        self.new_pollable(true)
    }
    fn write_zeroes(&mut self, _: Resource<Output>, len: u64) -> Streamed<()> {
        ensure!(len <= WRITE_BYTES, "a write of {len} bytes, when {WRITE_BYTES} were allowed");
        self.lines.print(&vec![0; len as usize]);
        Ok(Ok(()))
    }
    fn blocking_write_zeroes_and_flush(&mut self, handle: Resource<Output>, len: u64) -> Streamed<()> {
        self.write_zeroes(handle, len)
    }
    fn splice(&mut self, _: Resource<Output>, _: Resource<Input>, _: u64) -> Streamed<u64> {
        Ok(Err(StreamError::Closed))
    }
    fn blocking_splice(&mut self, _: Resource<Output>, _: Resource<Input>, _: u64) -> Streamed<u64> {
        Ok(Err(StreamError::Closed))
    }
    fn drop(&mut self, handle: Resource<Output>) -> Result<()> {
        self.handles.delete(handle)?;
        Ok(())
    }
}

impl clocks::monotonic_clock::Host for Sandbox {
    fn now(&mut self) -> Result<u64> {
        self.has_read = true;
        if self.in_apply {
            return Ok(0);
        }
        let real = || u64::try_from(self.env.clock.elapsed(self.started).as_nanos()).unwrap_or(u64::MAX);
        Ok(self.surroundings.monotonic(real))
    }
    fn resolution(&mut self) -> Result<u64> {
        Ok(1)
    }
    fn subscribe_instant(&mut self, when: u64) -> Result<Resource<Pollable>> {
        let ready = when <= self.now()?;
        self.new_pollable(ready)
    }
    fn subscribe_duration(&mut self, duration: u64) -> Result<Resource<Pollable>> {
        self.new_pollable(duration == 0)
    }
}

impl clocks::wall_clock::Host for Sandbox {
    fn now(&mut self) -> Result<clocks::wall_clock::Datetime> {
        self.has_read = true;
        let now = match self.in_apply {
            true => Duration::ZERO,
            false => Duration::from_millis(self.surroundings.wall(|| self.clock.now())),
        };
        Ok(clocks::wall_clock::Datetime { seconds: now.as_secs(), nanoseconds: now.subsec_nanos() })
    }
    fn resolution(&mut self) -> Result<clocks::wall_clock::Datetime> {
        Ok(clocks::wall_clock::Datetime { seconds: 0, nanoseconds: 1_000_000 })
    }
}

impl Sandbox {
    fn random_bytes(&mut self, len: u64) -> Result<Vec<u8>> {
        self.has_read = true;
        ensure!(len <= RANDOM_BYTES, "{len} random bytes asked for at once, at most {RANDOM_BYTES} are given");
        let mut bytes = vec![0; len as usize];
        if self.in_apply {
            for chunk in bytes.chunks_mut(8) {
                chunk.copy_from_slice(&self.fixed.next().to_le_bytes()[..chunk.len()]);
            }
        } else {
            let random = &self.env.random;
            self.surroundings.fill(&mut bytes, |bytes| random.fill(bytes)).map_err(wasmtime::Error::from_anyhow)?;
        }
        Ok(bytes)
    }

    fn random_u64(&mut self) -> Result<u64> {
        let bytes = self.random_bytes(size_of::<u64>() as u64)?;
        Ok(u64::from_le_bytes(bytes.as_slice().try_into()?))
    }
}

impl random::random::Host for Sandbox {
    fn get_random_bytes(&mut self, len: u64) -> Result<Vec<u8>> {
        self.random_bytes(len)
    }
    fn get_random_u64(&mut self) -> Result<u64> {
        self.random_u64()
    }
}

impl random::insecure::Host for Sandbox {
    fn get_insecure_random_bytes(&mut self, len: u64) -> Result<Vec<u8>> {
        self.random_bytes(len)
    }
    fn get_insecure_random_u64(&mut self) -> Result<u64> {
        self.random_u64()
    }
}

impl random::insecure_seed::Host for Sandbox {
    fn insecure_seed(&mut self) -> Result<(u64, u64)> {
        Ok((self.random_u64()?, self.random_u64()?))
    }
}
