//! Limit of connections per client address.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};

/// Number of connections of each address. Its size is bounded by the number of connections.
#[derive(Default)]
pub struct Addresses(Mutex<HashMap<IpAddr, usize>>);

/// Permit of a connection, released on drop.
pub struct ConnectionPermit {
    all: Arc<Addresses>,
    address: IpAddr,
}

impl Addresses {
    /// Returns a permit, unless the address has `most` connections already.
    pub fn enter(self: &Arc<Self>, address: IpAddr, most: usize) -> Option<ConnectionPermit> {
        let address = network(address);
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(address).or_default();
        if *count >= most {
            return None;
        }
        *count += 1;
        Some(ConnectionPermit { all: Arc::clone(self), address })
    }
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        let mut counts = self.all.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Entry::Occupied(mut count) = counts.entry(self.address) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
    }
}

/// Returns the network that counts as one address: for IPv6 the /64 of one customer, for IPv4-mapped IPv6 the IPv4 address.
pub fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX))),
        v4 => v4,
    }
}
