//! Randomness: of the operating system, or the reproducible one of a simulation.

use std::sync::Arc;

use uuid::Uuid;

/// An injected source of randomness.
pub trait Entropy: Send + Sync + 'static {
    fn fill(&self, bytes: &mut [u8]);
}

/// The source of randomness of a process.
#[derive(Clone)]
pub struct Random(Source);

#[derive(Clone)]
enum Source {
    System,
    Given(Arc<dyn Entropy>),
}

#[expect(clippy::disallowed_methods, reason = "the one place that reads the randomness of the system")]
impl Random {
    /// Creates the cryptographically secure source of the operating system.
    pub fn system() -> Self {
        Self(Source::System)
    }

    pub fn given(entropy: Arc<dyn Entropy>) -> Self {
        Self(Source::Given(entropy))
    }

    /// Fills `bytes`. Fails if the operating system provides no randomness.
    pub fn fill(&self, bytes: &mut [u8]) -> anyhow::Result<()> {
        match &self.0 {
            Source::System => getrandom::fill(bytes).map_err(|error| anyhow::anyhow!("no randomness: {error}")),
            Source::Given(entropy) => {
                entropy.fill(bytes);
                Ok(())
            }
        }
    }

    pub fn u64(&self) -> anyhow::Result<u64> {
        let mut bytes = [0; 8];
        self.fill(&mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Returns a random UUID, of version 4.
    pub fn uuid(&self) -> anyhow::Result<Uuid> {
        let mut bytes = [0; 16];
        self.fill(&mut bytes)?;
        Ok(uuid::Builder::from_random_bytes(bytes).into_uuid())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Sevens;

    impl Entropy for Sevens {
        fn fill(&self, bytes: &mut [u8]) {
            bytes.fill(7);
        }
    }

    #[test]
    fn given_source_replaces_the_system_source() {
        let random = Random::given(Arc::new(Sevens));
        assert_eq!(random.u64().unwrap(), 0x0707_0707_0707_0707);
        assert_eq!(random.uuid().unwrap().to_string(), "07070707-0707-4707-8707-070707070707");
    }

    #[test]
    fn system_source_does_not_repeat() {
        let random = Random::system();
        assert_ne!(random.uuid().unwrap(), random.uuid().unwrap());
    }
}
