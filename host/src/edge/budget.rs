//! Memory that clients hold: one budget for the bytes of all requests and responses in flight, and a part of it for each
//! connection.
//!
//! Owns: what is charged, what is refused, and which connection goes first when the budget is used up. A response is in
//! flight until the socket has taken it, so a client that asks and does not read holds what it asked for.
//! Must never know: requests, sockets.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use bytes::Bytes;
use kvs_metrics::{Measured, Page};
use tokio::sync::Notify;
use tokio::time::Instant;

/// The share of the budget that one connection can hold, but for a single request or response that is larger.
const CONNECTION_SHARE: usize = 4;
/// The share of the budget that is left to connections that hold little.
const SMALL_SHARE: usize = 8;
/// What is little. Not of one request: a client with many small ones is to leave room for others.
const SMALL: usize = 16 << 10;
/// A client that has not taken a response, or not sent a request, for so long is slow.
const SLOW: Duration = Duration::from_secs(1);
/// How often connections are looked through for a slow one.
const LOOK: Duration = Duration::from_millis(10);

/// There is no room for this in the budget.
#[derive(Debug)]
pub struct Exceeded;

pub struct Budget {
    limit: usize,
    used: AtomicUsize,
    /// Of all open connections, and when they were last looked through.
    accounts: Mutex<(Vec<Weak<Account>>, Option<Instant>)>,
}

/// What one connection holds.
pub struct Account {
    budget: Arc<Budget>,
    charges: Mutex<Charges>,
    cut: Notify,
}

#[derive(Default)]
struct Charges {
    held: usize,
    next: u64,
    /// With the time since when each waits for the client; none while it waits for this server.
    all: BTreeMap<u64, (Option<Instant>, usize)>,
}

/// What one request, and then its response, holds, until it is dropped.
pub struct Charge {
    account: Arc<Account>,
    free: usize,
    number: Option<u64>,
    bytes: usize,
}

impl Budget {
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit, used: AtomicUsize::new(0), accounts: Mutex::default() })
    }

    fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    /// An account for a connection, for as long as it is there.
    pub fn open(self: &Arc<Self>) -> Arc<Account> {
        let account = Arc::new(Account { budget: Arc::clone(self), charges: Mutex::default(), cut: Notify::new() });
        let mut accounts = lock(&self.accounts);
        // Those that are gone go when there are as many as can double the list.
        if accounts.0.len() == accounts.0.capacity() {
            accounts.0.retain(|account| account.strong_count() > 0);
        }
        accounts.0.push(Arc::downgrade(&account));
        account
    }

    fn take(&self, more: usize, is_small: bool) -> Result<(), Exceeded> {
        let limit = if is_small { self.limit } else { self.limit - self.limit / SMALL_SHARE };
        let taken = self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
            used.checked_add(more).filter(|used| *used <= limit)
        });
        taken.map(drop).map_err(|_| Exceeded)
    }

    /// Has the slow connection cut that holds most. The next request finds its room.
    fn relieve(&self) {
        let mut accounts = lock(&self.accounts);
        let now = Instant::now();
        if accounts.1.is_some_and(|last| now - last < LOOK) {
            return;
        }
        accounts.1 = Some(now);
        let held = |account: Arc<Account>| {
            let charges = lock(&account.charges);
            let slow = charges.all.values().any(|(since, _)| since.is_some_and(|since| now - since >= SLOW));
            let held = charges.held;
            drop(charges);
            slow.then_some((held, account))
        };
        let slowest = accounts.0.iter().filter_map(Weak::upgrade).filter_map(held).max_by_key(|(held, _)| *held);
        if let Some((_, account)) = slowest {
            account.cut.notify_one();
        }
    }
}

impl Measured for Budget {
    fn measure(&self, page: &mut Page<'_>) -> fmt::Result {
        let help = "Bytes of requests and responses in flight, but for small ones over HTTP/1.1";
        page.gauge("inflight_bytes", help, self.used() as u64)?;
        page.gauge("inflight_bytes_limit", "Most bytes of requests and responses in flight", self.limit as u64)
    }
}

impl Account {
    /// Returns when the connection is to be cut.
    pub async fn cut(&self) {
        self.cut.notified().await;
    }

    /// A request that holds nothing yet. This many bytes of it are free.
    pub fn begin(self: &Arc<Self>, free: usize) -> Charge {
        Charge { account: Arc::clone(self), free, number: None, bytes: 0 }
    }

    /// Changes a charge. `must` charges whatever there is room for.
    fn resize(&self, charge: (Option<u64>, usize), bytes: usize, must: bool) -> Result<Option<u64>, Exceeded> {
        let (number, before) = charge;
        let budget = &self.budget;
        let mut charges = lock(&self.charges);
        let others = charges.held - before;
        if bytes > before {
            let more = bytes - before;
            let fits = others == 0 || others + bytes <= budget.limit / CONNECTION_SHARE;
            if must {
                budget.used.fetch_add(more, Ordering::Relaxed);
            } else if !fits {
                return Err(Exceeded);
            } else if let Err(exceeded) = budget.take(more, others + bytes <= SMALL) {
                drop(charges);
                budget.relieve();
                return Err(exceeded);
            }
        } else {
            budget.used.fetch_sub(before - bytes, Ordering::Relaxed);
        }
        charges.held = others + bytes;
        let Charges { next, all, .. } = &mut *charges;
        if bytes == 0 {
            number.map(|number| all.remove(&number));
            return Ok(None);
        }
        let number = number.unwrap_or_else(|| {
            *next += 1;
            *next
        });
        all.entry(number).or_insert_with(|| (Some(Instant::now()), 0)).1 = bytes;
        Ok(Some(number))
    }

    fn set_waiting(&self, number: Option<u64>, since: Option<Instant>) {
        let Some(number) = number else { return };
        if let Some(charge) = lock(&self.charges).all.get_mut(&number) {
            charge.0 = since;
        }
    }
}

impl Charge {
    /// Holds this many bytes from now on, when there is room for them.
    pub fn hold(&mut self, bytes: usize) -> Result<(), Exceeded> {
        let bytes = self.charged(bytes);
        if bytes == self.bytes {
            return Ok(());
        }
        self.number = self.account.resize((self.number, self.bytes), bytes, false)?;
        self.bytes = bytes;
        Ok(())
    }

    /// What is held waits for this server from now on: the client is not slow meanwhile.
    pub fn wait_for_server(&self) {
        self.account.set_waiting(self.number, None);
    }

    /// What is held waits for the client from now on.
    pub fn wait_for_client(&self) {
        self.account.set_waiting(self.number, Some(Instant::now()));
    }

    /// Holds this many bytes whatever there is room for: what cannot be refused any more.
    pub fn must_hold(&mut self, bytes: usize) {
        let bytes = self.charged(bytes);
        if bytes == self.bytes {
            return;
        }
        if let Ok(number) = self.account.resize((self.number, self.bytes), bytes, true) {
            (self.number, self.bytes) = (number, bytes);
        }
    }

    fn charged(&self, bytes: usize) -> usize {
        if bytes <= self.free { 0 } else { bytes }
    }

    /// The bytes, charged until the last copy of them is gone.
    pub fn keep(self, bytes: Bytes) -> Bytes {
        struct Charged(Bytes, #[expect(dead_code, reason = "held, and given back by its drop")] Charge);
        impl AsRef<[u8]> for Charged {
            fn as_ref(&self) -> &[u8] {
                &self.0
            }
        }
        if self.bytes == 0 { bytes } else { Bytes::from_owner(Charged(bytes, self)) }
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        if self.bytes == 0 {
            return;
        }
        // Less always fits.
        let _ = self.account.resize((self.number, self.bytes), 0, false);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    const MIB: usize = 1 << 20;

    #[test]
    fn charge_is_returned_with_the_last_copy_of_its_bytes() {
        let budget = Budget::new(8 * MIB);
        let mut charge = budget.open().begin(0);
        charge.hold(100).expect("there is room");
        charge.hold(150).expect("there is room");
        assert_eq!(budget.used(), 150);
        charge.hold(40).expect("less always fits");
        let bytes = charge.keep(Bytes::from_static(b"value"));
        let part = bytes.slice(1..2);
        drop(bytes);
        assert_eq!((budget.used(), &part[..]), (40, &b"a"[..]));
        drop(part);
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn bytes_up_to_the_free_ones_are_not_charged() {
        let budget = Budget::new(8 * MIB);
        let mut charge = budget.open().begin(100);
        charge.hold(100).expect("it is free");
        assert_eq!(budget.used(), 0);
        charge.hold(101).expect("there is room");
        assert_eq!(budget.used(), 101);
        charge.hold(100).expect("it is free");
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn one_connection_holds_its_share_and_small_ones_find_room() {
        let budget = Budget::new(8 * MIB);
        let greedy = budget.open();
        let mut first = greedy.begin(0);
        first.hold(3 * MIB).expect("alone it may be larger than the share");
        assert!(greedy.begin(0).hold(1).is_err(), "and nothing more");
        let others: Vec<_> = (0..4)
            .map(|_| {
                let mut charge = budget.open().begin(0);
                charge.hold(MIB).expect("there is room");
                charge
            })
            .collect();
        assert!(budget.open().begin(0).hold(SMALL + 1).is_err());
        budget.open().begin(0).hold(SMALL).expect("a part is left to small ones");
        let many = budget.open();
        let mut first_of_many = many.begin(0);
        first_of_many.hold(SMALL).expect("it holds little");
        assert!(many.begin(0).hold(1).is_err(), "many small ones are not little");
        let mut written = budget.open().begin(0);
        written.must_hold(2 * MIB);
        assert_eq!(budget.used(), 9 * MIB + SMALL);
        drop((others, written, first, first_of_many));
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn slow_connection_that_holds_most_is_cut_first() {
        let budget = Budget::new(8 * MIB);
        let accounts = [2, 4, 1].map(|mib| {
            let account = budget.open();
            let mut charge = account.begin(0);
            charge.must_hold(mib * MIB);
            (account, charge)
        });
        let cut = || accounts.each_ref().map(|(account, _)| account.cut().now_or_never().is_some());
        assert!(budget.open().begin(0).hold(MIB).is_err());
        assert_eq!(cut(), [false; 3], "none is slow");
        for (account, _) in &accounts {
            let since = |since: &mut Instant| *since -= SLOW;
            lock(&account.charges).all.values_mut().for_each(|(waits, _)| waits.iter_mut().for_each(since));
        }
        lock(&budget.accounts).1 = None;
        assert!(budget.open().begin(0).hold(MIB).is_err());
        assert_eq!(cut(), [false, true, false]);
        let [_, (_, charge), _] = &accounts;
        charge.wait_for_server();
        lock(&budget.accounts).1 = None;
        assert!(budget.open().begin(0).hold(MIB).is_err());
        assert_eq!(cut(), [true, false, false], "who waits for the server is not slow");
    }
}
