//! Ways to break the log, each of which the crash tests must find.

use std::cell::Cell;

use super::disk::Lie;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutant {
    NoFileSync,
    NoDirectorySync,
    EarlyAnswer,
    NoGate,
    NoChecksum,
    TailNotCut,
    OldRemovedFirst,
    CompactedNotSynced,
    RecoveryNotSynced,
    ReplacedRemovedAtOnce,
    MemoryBelieved,
    IncarnationNotSynced,
    IdentityFirst,
    JumpSkipped,
    NewestIncarnationDropped,
    OsNotRecorded,
    PublishedEarly,
    PositionBelieved,
    FollowerCleans,
    TakeoverSkips,
    /// These are found by the tests of the standby.
    OldestOpenedFirst,
    PositionReadFirst,
    ForgottenIgnored,
    TakenUnlocked,
    /// These are found by the tests of group commit.
    LoneClientDelayed,
    IdleIgnored,
    DelayUnbounded,
    LargeBatchDelayed,
    IdleUnlocked,
}

impl Mutant {
    pub const ALL: [(Self, &'static str); 20] = [
        (Self::NoFileSync, "no fdatasync"),
        (Self::NoDirectorySync, "no sync of the directory"),
        (Self::EarlyAnswer, "answered before the sync"),
        (Self::NoGate, "a read shows what is not durable yet"),
        (Self::NoChecksum, "no checksum is checked"),
        (Self::TailNotCut, "a torn tail is not cut"),
        (Self::OldRemovedFirst, "old segments removed before the new one's name is synced"),
        (Self::CompactedNotSynced, "a compacted segment is not synced"),
        (Self::RecoveryNotSynced, "what recovery read is not synced"),
        (Self::ReplacedRemovedAtOnce, "recovery removes replaced segments before it syncs the directory"),
        (Self::MemoryBelieved, "recovery believes what a failed sync left in memory"),
        (Self::IncarnationNotSynced, "an incarnation is served before it is synced"),
        (Self::IdentityFirst, "a copy is taken for the log before its incarnation is synced"),
        (Self::JumpSkipped, "an incarnation gives sequences of its parent again"),
        (Self::NewestIncarnationDropped, "compaction drops the newest incarnation"),
        (Self::OsNotRecorded, "a run with --durability os leaves no trace before its first answer"),
        (Self::PublishedEarly, "the position is published before the sync"),
        (Self::PositionBelieved, "a standby believes the position of a log that lost its tail"),
        (Self::FollowerCleans, "a standby removes what looks left behind"),
        (Self::TakeoverSkips, "a takeover continues after an entry that was not applied"),
    ];

    /// The disk that is all it takes; none when code of the log asks for the mutant itself.
    pub fn lie(self) -> Option<Lie> {
        match self {
            Self::NoFileSync => Some(Lie::FileSync),
            Self::NoDirectorySync => Some(Lie::NameSync),
            Self::TailNotCut => Some(Lie::Zeros),
            Self::OldRemovedFirst => Some(Lie::NameSyncWhileReplaced),
            Self::CompactedNotSynced => Some(Lie::CompactedSync),
            _ => None,
        }
    }

    /// The same, for as long as recovery is in progress.
    pub fn lie_in_recovery(self) -> Option<Lie> {
        match self {
            Self::RecoveryNotSynced => Some(Lie::SegmentSync),
            Self::ReplacedRemovedAtOnce => Some(Lie::NameSyncWhileReplaced),
            Self::MemoryBelieved => Some(Lie::Forget),
            _ => self.lie(),
        }
    }
}

thread_local! {
    static ON: Cell<Option<Mutant>> = const { Cell::new(None) };
}

/// Switches one on for this thread, or all off.
pub fn set(mutant: Option<Mutant>) {
    ON.set(mutant);
}

/// Asked by the code that a mutant changes.
pub fn is(mutant: Mutant) -> bool {
    ON.get() == Some(mutant)
}
