//! `/read-only` on the admin listener: rejects writes, for maintenance, until they are accepted again.
//!
//! The state is kept over restarts, by a file in the data directory.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use hyper::header::{self, HeaderValue};
use hyper::{Method, StatusCode};
use kvs_metrics::{Measured, Page};
use kvs_txlog::TransactionLog;
use kvs_txlog::change_feed::ChangeFeed;
use kvs_txlog::file::disk::sync_directory;
use tokio::task;
use tokio::time::timeout;
use tracing::{info, warn};

use super::{Answer, not_allowed, text};
use crate::audit::{self, Actor};

/// Name of the file in the data directory that is there while the server is read-only.
const FILE: &str = "read-only";
/// Maximum wait for the writes before the switch to be durable: shorter than the read timeout of `kvs read-only`.
const DURABLE_TIMEOUT: Duration = Duration::from_secs(30);

/// The switch, and what it acts on.
pub struct ReadOnly {
    changes: Arc<ChangeFeed>,
    data: PathBuf,
    users: DataUsers,
    /// Whether another process reads the file. Held while the file and the switch change.
    handing_over: Mutex<bool>,
}

/// Servers to which the data directory, and so the state, belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DataUsers {
    This,
    /// Its primary too, until this server is primary.
    Pair,
    /// This server reads it only.
    Others,
}

/// Why the state was not changed, or a backup would lack a write.
#[derive(Debug, thiserror::Error)]
enum ChangeError {
    #[error("{0}")]
    Foreign(&'static str),
    #[error("cannot keep the state in {}: {error}", file.display())]
    NotKept { file: PathBuf, error: io::Error },
    #[error("an upgrade is in progress; try again")]
    HandingOver,
    #[error(
        "read-only is on, but writes before it are not known to be durable: {0}; a backup may lack them, so turn it on again first"
    )]
    NotDurable(String),
}

impl ChangeError {
    fn status(&self) -> StatusCode {
        match self {
            Self::Foreign(_) => StatusCode::CONFLICT,
            Self::NotKept { .. } => StatusCode::INTERNAL_SERVER_ERROR,
            Self::HandingOver | Self::NotDurable(_) => StatusCode::SERVICE_UNAVAILABLE,
        }
    }
}

impl ReadOnly {
    pub fn open(changes: Arc<ChangeFeed>, data: &Path, users: DataUsers) -> Result<Arc<Self>> {
        let read_only = Self { changes, data: data.into(), users, handing_over: Mutex::default() };
        read_only.resume()?;
        Ok(Arc::new(read_only))
    }

    /// Continues in the state of the data directory, which a standby on it shares with the former primary.
    pub fn resume(&self) -> Result<()> {
        let mut handing_over = self.handing_over();
        let file = self.data.join(FILE);
        let is_on = file.try_exists().with_context(|| format!("cannot look for {}", file.display()))?;
        if is_on {
            warn!("read-only since before the start: writes are rejected until kvs read-only off");
        }
        self.changes.reject_appends(is_on);
        *handing_over = false;
        Ok(())
    }

    /// Rejects changes until `resume`, since another process is about to read the file. Waits for one that is in progress.
    pub fn hold(&self) {
        *self.handing_over() = true;
    }

    fn handing_over(&self) -> MutexGuard<'_, bool> {
        // Every change under this lock is whole.
        self.handing_over.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub async fn respond(self: &Arc<Self>, method: &Method, actor: &Actor) -> Answer {
        let changed = match *method {
            Method::GET | Method::HEAD => Ok(()),
            Method::PUT => self.change(true, actor).await,
            Method::DELETE => self.change(false, actor).await,
            _ => return not_allowed("GET, HEAD, PUT, DELETE"),
        };
        match changed {
            Ok(()) => text(StatusCode::OK, if self.changes.rejects_appends() { "on\n" } else { "off\n" }),
            Err(error) => {
                let mut response = text(error.status(), format!("{error}\n"));
                if matches!(error, ChangeError::HandingOver) {
                    response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
                }
                response
            }
        }
    }

    /// Changes the state in another thread: the admin listener waits for no disk.
    async fn change(self: &Arc<Self>, on: bool, actor: &Actor) -> Result<(), ChangeError> {
        let changed = Arc::clone(self);
        let done = match self.not_ours() {
            Some(reason) => Err(ChangeError::Foreign(reason)),
            None => {
                let set = task::spawn_blocking(move || changed.set(on)).await;
                set.unwrap_or_else(|error| Err(self.not_kept(io::Error::other(error))))
            }
        };
        // Before the wait, which ends with its client.
        let outcome = done.as_ref().map_or_else(ToString::to_string, |()| "success".to_owned());
        audit::log(actor, "read-only", if on { "on" } else { "off" }, outcome);
        done?;
        if on { self.settled().await } else { Ok(()) }
    }

    /// Why the state in the data directory cannot be changed here.
    fn not_ours(&self) -> Option<&'static str> {
        match self.users {
            DataUsers::Pair if self.changes.read_only().is_some() => Some(
                "this server stands by and shares the data directory of its primary; send this to the admin listener of the primary",
            ),
            DataUsers::Others => {
                Some("this server was started with --read-only, and changes nothing in the data directory")
            }
            DataUsers::This | DataUsers::Pair => None,
        }
    }

    /// Waits until everything that was appended before the switch is durable, so that a backup taken now has it.
    async fn settled(&self) -> Result<(), ChangeError> {
        let (log, end) = (self.changes.watermark(), self.changes.appended());
        match timeout(DURABLE_TIMEOUT, log.reached(end)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(unknown)) => Err(ChangeError::NotDurable(unknown.to_string())),
            Err(_) => {
                let durable = log.durable();
                let reason = format!("the log is durable up to sequence {durable} of {end} after {DURABLE_TIMEOUT:?}");
                Err(ChangeError::NotDurable(reason))
            }
        }
    }

    /// Changes the state, and keeps it: it is on from the switch to the removal of the file.
    fn set(&self, on: bool) -> Result<(), ChangeError> {
        let handing_over = self.handing_over();
        if *handing_over {
            return Err(ChangeError::HandingOver);
        }
        self.keep(on).map_err(|error| self.not_kept(error))?;
        self.changes.reject_appends(on);
        info!("read-only is {}", if on { "on: writes are rejected" } else { "off: writes are accepted" });
        Ok(())
    }

    fn keep(&self, on: bool) -> io::Result<()> {
        let file = self.data.join(FILE);
        if on {
            File::create(&file)?;
        } else {
            match fs::remove_file(&file) {
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        sync_directory(&self.data)
    }

    fn not_kept(&self, error: io::Error) -> ChangeError {
        ChangeError::NotKept { file: self.data.join(FILE), error }
    }
}

impl Measured for ReadOnly {
    fn measure(&self, page: &mut Page<'_>) -> fmt::Result {
        let help = "1 while writes are rejected for maintenance";
        page.gauge("read_only", help, self.changes.rejects_appends().into())
    }
}
