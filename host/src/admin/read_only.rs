//! `/read-only` on the admin listener: rejects writes, for maintenance, until they are accepted again.
//!
//! The state is kept over restarts, by a file in the data directory.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result};
use hyper::header::{self, HeaderValue};
use hyper::{Method, StatusCode};
use kvs_metrics::{Measured, Page};
use kvs_txlog::change_feed::ChangeFeed;
use kvs_txlog::file::disk::sync_directory;
use tokio::task;
use tracing::{info, warn};

use super::{Answer, not_allowed, text};
use crate::audit::{self, Actor};

/// Name of the file in the data directory that is there while the server is read-only.
const FILE: &str = "read-only";
const HANDING_OVER: &str = "an upgrade is in progress; try again";

/// The switch, and what it acts on.
pub struct ReadOnly {
    changes: Arc<ChangeFeed>,
    data: PathBuf,
    /// Whether another process reads the file. Held while the file and the switch change.
    handing_over: Mutex<bool>,
}

impl ReadOnly {
    pub fn open(changes: Arc<ChangeFeed>, data: &Path) -> Result<Arc<Self>> {
        let read_only = Self { changes, data: data.into(), handing_over: Mutex::default() };
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
            Method::GET | Method::HEAD => Ok(true),
            Method::PUT => self.change(true, actor).await,
            Method::DELETE => self.change(false, actor).await,
            _ => return not_allowed("GET, HEAD, PUT, DELETE"),
        };
        match changed {
            Ok(true) => text(StatusCode::OK, if self.changes.rejects_appends() { "on\n" } else { "off\n" }),
            Ok(false) => {
                let mut response = text(StatusCode::SERVICE_UNAVAILABLE, format!("{HANDING_OVER}\n"));
                response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
                response
            }
            Err(error) => {
                let file = self.data.join(FILE);
                text(
                    StatusCode::INTERNAL_SERVER_ERROR,
                    format!("cannot keep the state in {}: {error}\n", file.display()),
                )
            }
        }
    }

    /// Changes the state in another thread: the admin listener waits for no disk.
    async fn change(self: &Arc<Self>, on: bool, actor: &Actor) -> io::Result<bool> {
        let changed = Arc::clone(self);
        let done = task::spawn_blocking(move || changed.set(on)).await;
        let done = done.unwrap_or_else(|error| Err(io::Error::other(error)));
        let outcome = match &done {
            Ok(true) => "success".to_owned(),
            Ok(false) => HANDING_OVER.to_owned(),
            Err(error) => error.to_string(),
        };
        audit::log(actor, "read-only", if on { "on" } else { "off" }, outcome);
        done
    }

    /// Changes the state, and keeps it: it is on from the switch to the removal of the file. False when another process
    /// takes over.
    fn set(&self, on: bool) -> io::Result<bool> {
        let handing_over = self.handing_over();
        if *handing_over {
            return Ok(false);
        }
        let file = self.data.join(FILE);
        if on {
            File::create(&file)?;
        } else {
            match fs::remove_file(&file) {
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        sync_directory(&self.data)?;
        self.changes.reject_appends(on);
        info!("read-only is {}", if on { "on: writes are rejected" } else { "off: writes are accepted" });
        Ok(true)
    }
}

impl Measured for ReadOnly {
    fn measure(&self, page: &mut Page<'_>) -> fmt::Result {
        let help = "1 while writes are rejected for maintenance";
        page.gauge("read_only", help, self.changes.rejects_appends().into())
    }
}
