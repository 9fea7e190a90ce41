//! A response cache as it is in operation: filled by the reads that are to be measured.
//!
//! Right after PUTs of all keys, and after a start, most reads are misses, and a minute later most are hits: what is measured in
//! between depends on when.

use std::time::Duration;

use anyhow::Result;

use crate::load::Load;
use crate::process::Server;

/// Time between two looks at the hit rate: long enough for some 10^5 requests.
const STEP: Duration = Duration::from_secs(3);
/// Change of the hit rate in that time that counts as none.
const STEADY: f64 = 0.005;
/// Where the cache takes longer, what it has by then is measured.
const STEPS: usize = 40;

/// Sends the load to a server until its hit rate is steady, or at once if it has no cache.
pub fn warm(server: &Server, load: &Load<'_>) -> Result<()> {
    let load = Load { time: STEP, ..*load };
    let mut before = f64::NEG_INFINITY;
    for _ in 0..STEPS {
        let hit_rate = load.wrk_of_kvs(server)?.hit_rate;
        if hit_rate.is_nan() || (hit_rate - before).abs() < STEADY {
            break;
        }
        before = hit_rate;
    }
    Ok(())
}
