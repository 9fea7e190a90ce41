//! A standby beside a history: what it applies, also after a takeover, and whether that is what the log holds.

use std::collections::BTreeMap;

use super::content::{Model, Outcome};
use super::*;
use crate::Forgotten;
use crate::file::follower::Follower;
use crate::file::home::Home;
use crate::file::recovery::Known;

fn home(disk: Arc<dyn Disk>, options: &Options) -> Home {
    Home { disk, data: options.data.clone(), env: options.env.clone() }
}

pub struct Beside {
    follower: Follower,
    /// The last entry of each key, deletes too.
    store: BTreeMap<String, (u64, Option<u64>, String)>,
    pub applied: u64,
}

impl Beside {
    pub fn new(disk: Arc<dyn Disk>, options: &Options) -> Self {
        Self { follower: Follower::new(home(disk, options)), store: BTreeMap::new(), applied: 0 }
    }

    /// The same, as if it had followed another disk with this content.
    pub fn on(&self, disk: Arc<dyn Disk>, options: &Options) -> Self {
        Self { follower: self.follower.on(home(disk, options)), store: self.store.clone(), applied: self.applied }
    }

    /// Limits the number of its open segments.
    pub fn with_open(self, open: u64) -> Self {
        Self { follower: self.follower.with_open(open), ..self }
    }

    /// Applies what is new, as `follow` does. Where the log says nothing, nothing is applied.
    pub fn pass(&mut self) {
        if self.follower.look().is_err() {
            return;
        }
        let _ = self.apply(None);
        self.follower.passed(self.applied);
    }

    /// Applies the rest of the log that it has taken over.
    pub fn take_over(&mut self, shared: &Shared) -> Outcome<()> {
        self.apply(Some(shared)).map_err(|error| format!("the rest cannot be applied after a takeover: {error:#}"))
    }

    fn apply(&mut self, taken_over: Option<&Shared>) -> anyhow::Result<()> {
        match self.apply_after(self.applied, taken_over) {
            Err(error) if error.is::<Forgotten>() => {
                (self.store, self.applied) = (BTreeMap::new(), 0);
                self.apply_after(0, taken_over)
            }
            applied => applied,
        }
    }

    fn apply_after(&mut self, after: u64, taken_over: Option<&Shared>) -> anyhow::Result<()> {
        let mut read = Vec::new();
        let receive: &mut Receive<'_> = &mut |entries| {
            for entry in entries {
                let expires = match &entry.event {
                    EventRef::Put(put) => put.expires,
                    EventRef::Delete(_) => Some(0),
                };
                read.push((entry.event.key().into(), (entry.sequence, expires, describe(&entry.event))));
            }
            Ok(())
        };
        self.applied = match taken_over {
            Some(shared) => replay::replay(shared, after, receive)?,
            None => self.follower.replay(after, receive)?,
        };
        // What cannot be read to its end is not applied.
        self.store.extend(read);
        Ok(())
    }

    /// What a takeover must find.
    pub fn known(&self) -> Option<Known> {
        self.follower.known()
    }

    /// Compares what was applied with the log up to the same sequence; what had expired may be missing.
    pub fn check(&self, model: &Model) -> Outcome<()> {
        let now = model.compactions.iter().map(|(_, now)| *now).max().unwrap_or(0);
        let mut expected = BTreeMap::new();
        for entry in model.until(self.applied) {
            let expires = match &entry.event {
                Event::Put(put) => put.expires,
                Event::Delete(_) => Some(0),
            };
            expected.insert(entry.event.key(), (entry.sequence, expires, describe_owned(&entry.event)));
        }
        expected.retain(|_, (_, expires, _)| expires.is_none_or(|expires| expires > now));
        let live = self.store.iter().filter(|(_, (_, expires, _))| expires.is_none_or(|expires| expires > now));
        let live: BTreeMap<_, _> = live.map(|(key, value)| (key.as_str(), value.clone())).collect();
        if live == expected {
            return Ok(());
        }
        let sequence = |(key, (sequence, ..)): (&&str, &(u64, _, _))| format!("{key:?} of {sequence}");
        let wrong = live.iter().find(|(key, value)| expected.get(*key) != Some(value)).map(sequence);
        let missing = expected.iter().find(|(key, _)| !live.contains_key(*key)).map(sequence);
        Err(format!("a standby that applied all up to {} has {wrong:?} and lacks {missing:?}", self.applied))
    }
}
