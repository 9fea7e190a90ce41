//! Instances without a state, which route requests and make one answer of many.
//!
//! They are taken as they are needed, so there are as many as threads that ask at once. Must never know: what is stored.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Result;

use super::engine::Guest;
use super::instance::Instance;
use super::owner::Part;
use kvs_txlog::TransactionLog;

/// One that has grown beyond this, with the answers it merged, is not kept.
const KEPT_BYTES: usize = 16 << 20;

pub struct Routers {
    guest: Arc<Guest>,
    log: Arc<dyn TransactionLog>,
    /// Anyone's: they may not append.
    part: Part,
    idle: Mutex<Vec<Instance>>,
}

impl Routers {
    pub fn new(guest: Arc<Guest>, log: Arc<dyn TransactionLog>, part: Part) -> Self {
        Self { guest, log, part, idle: Mutex::default() }
    }

    /// The number of the guest that routes.
    pub fn guest(&self) -> u64 {
        self.guest.number()
    }

    /// The time that the guest sees now, in milliseconds since 1970.
    pub fn now(&self) -> u64 {
        self.guest.clock().now()
    }

    /// Asks one of them. One that traps is not asked again.
    pub fn ask<T, E>(&self, question: impl FnOnce(&mut Instance) -> Result<T, E>) -> Result<T>
    where
        anyhow::Error: From<E>,
    {
        let idle = self.idle().pop();
        let mut asked = match idle {
            Some(instance) => instance,
            None => self.guest.instantiate(Arc::clone(&self.log), self.part.clone())?,
        };
        let answer = question(&mut asked)?;
        if asked.memory_bytes() <= KEPT_BYTES {
            self.idle().push(asked);
        }
        Ok(answer)
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Instance>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
