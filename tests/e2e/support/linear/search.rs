//! Search for a linearization: an order of all known operations and some unknown ones in which every outcome is right.
//!
//! Depth-first, after Wing and Gong, with the memory of Lowe. Operations of unknown outcome make this hard: each of them is
//! concurrent with everything after it, so n of them have 2^n subsets, and a violation is found only after all of them.
//! Five rules keep the search small; the comment at each says why no linearization is lost. Must never know: the source of
//! a history.

use std::collections::{BTreeMap, HashMap};

use super::compiled::{Bits, Classes, Compiled, Op};
use super::history::Operation;

/// Costs of a search. They decide whether there is a verdict, and never which.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Configurations visited at most. The problem is NP-complete, so there are histories that need more. `stress.rs`
    /// verifies that those of the recorder need far less.
    pub limit: usize,
    /// Configurations visited depth-first, before the search starts again by layers.
    pub depth_first: usize,
    /// Starts with the real history, without rule 1: for tests of the other rules.
    pub exact: bool,
}

impl Default for Effort {
    fn default() -> Self {
        Self { limit: 1_000_000, depth_first: 2_000, exact: false }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Linearizable,
    NotLinearizable,
    /// The limit was reached. Never a pass.
    Undecided,
}

/// Returns a verdict, and the number of configurations that were visited for it.
///
/// Rule 1, refinement. Most unknown operations never show, and it hardly ever matters that each happens at most once. So the
/// search is of a relaxed history first, in which unknown operations that are not tracked can happen any number of times.
/// It has every linearization of the real history: where it has none, there is none. Where the one found has no operation
/// twice, it is one of the real history. Otherwise the operations in it twice are tracked from then on, and the search
/// starts again. Each round tracks at least one more, so this ends, at the latest with the real history.
pub fn search(history: &[Operation], effort: Effort) -> (Verdict, usize) {
    let Effort { limit, depth_first, exact } = effort;
    let Some(compiled) = Compiled::new(history) else { return (Verdict::NotLinearizable, 0) };
    let mut tracked = compiled.sole_suppliers();
    if exact {
        (0..compiled.unknown.len()).for_each(|at| tracked.insert(at));
    }
    let mut visited = 0;
    let mut order = Order::DepthFirst;
    loop {
        let budget = match order {
            Order::DepthFirst => depth_first.min(limit - visited),
            Order::Layers => limit - visited,
        };
        let mut search = Search { compiled: &compiled, tracked: &tracked, order, memory: HashMap::new(), visited: 0 };
        let found = search.run(budget);
        visited += search.visited;
        match found {
            Found::Nothing => return (Verdict::NotLinearizable, visited),
            Found::Budget if visited == limit => return (Verdict::Undecided, visited),
            Found::Budget => order = Order::Layers,
            Found::Linearization { repeated } if repeated.is_empty() => return (Verdict::Linearizable, visited),
            Found::Linearization { repeated } => repeated.iter().for_each(|at| tracked.insert(at)),
        }
    }
}

/// The order in which configurations are visited, which does not change what is found.
#[derive(Clone, Copy, PartialEq)]
enum Order {
    /// Finds most linearizations almost at once.
    DepthFirst,
    /// By the number of done operations, and then of gone ones. Visits none that another dominates, where depth-first can
    /// visit a hundred for one that dominates them all: it is for the histories without a linearization.
    Layers,
}

enum Found {
    /// A linearization of the relaxed history, and the operations that are in it more than once.
    Linearization {
        repeated: Bits,
    },
    Nothing,
    /// The budget was used up before anything was found.
    Budget,
}

/// A point of the search: operations that have happened, and what they left behind.
#[derive(Clone)]
struct Config {
    /// Known operations that have happened.
    done: Bits,
    /// Unknown operations that cannot happen any more: tracked ones that have happened, and dead ones.
    gone: Bits,
    classes: Classes,
    /// All known operations before this one are done.
    first: usize,
    /// Unknown operations on the way here, and those more than once. No part of the memory: they decide nothing after it.
    used: Bits,
    repeated: Bits,
}

struct Search<'c> {
    compiled: &'c Compiled,
    tracked: &'c Bits,
    order: Order,
    /// Sets of gone operations that were visited, for each set of done operations and what these left behind.
    memory: HashMap<(Bits, Classes), Vec<Bits>>,
    visited: usize,
}

impl Search<'_> {
    fn run(&mut self, budget: usize) -> Found {
        let compiled = self.compiled;
        let no_unknown = Bits::new(compiled.unknown.len());
        let start = Config {
            done: Bits::new(compiled.known.len()),
            gone: no_unknown.clone(),
            classes: compiled.initial(),
            first: 0,
            used: no_unknown.clone(),
            repeated: no_unknown,
        };
        // One stack in all, or one for each layer.
        let mut stacks = BTreeMap::from([((0, 0), self.settle(start).into_iter().collect::<Vec<_>>())]);
        while let Some(mut stack) = stacks.first_entry() {
            let Some(mut config) = stack.get_mut().pop() else {
                stack.remove();
                continue;
            };
            let (candidates, bar) = self.candidates(&mut config);
            if candidates.is_empty() {
                return Found::Linearization { repeated: config.repeated };
            }
            if self.is_dominated(&config) {
                continue;
            }
            if self.visited == budget {
                return Found::Budget;
            }
            self.visited += 1;
            // The last pushed is visited first: known operations before unknown ones, which need not happen, and of these
            // the ones that are not repeated.
            for after in self.successors(&config, &candidates, bar).into_iter().rev() {
                let layer = match self.order {
                    Order::DepthFirst => (0, 0),
                    Order::Layers => (after.done.len(), after.gone.len()),
                };
                stacks.entry(layer).or_default().push(after);
            }
        }
        Found::Nothing
    }

    fn successors(&self, config: &Config, candidates: &[usize], bar: u64) -> Vec<Config> {
        let Compiled { known, unknown, .. } = self.compiled;
        let mut successors = Vec::new();
        for at in candidates.iter().copied().filter(|at| known[*at].is_enabled(&config.classes)) {
            let mut after = config.clone();
            after.done.insert(at);
            known[at].apply(&mut after.classes);
            successors.extend(self.settle(after));
        }
        for at in self.unknown_candidates(config, bar) {
            let mut after = config.clone();
            if self.tracked.contains(at) {
                after.gone.insert(at);
            } else if after.used.contains(at) {
                after.repeated.insert(at);
            }
            after.used.insert(at);
            unknown[at].apply(&mut after.classes);
            successors.extend(self.settle(after));
        }
        successors
    }

    /// Takes the steps that need no choice. None for a dead end.
    ///
    /// Rule 2, eager reads. An operation that writes nothing and can be next is next, without a choice. In a linearization
    /// that has it later it can be moved here: it finds what it needs, nothing else depends on it, and all that must
    /// precede it is done.
    ///
    /// Rule 3, dead ends. An operation needs a key in a state that the key is not in, and all operations that bring it about
    /// are done or gone: it cannot happen after this point, in any order. Values are unique, so the search ends as soon as a
    /// value is overwritten that a later response has. Unknown operations that are dead are gone from here on.
    fn settle(&self, mut config: Config) -> Option<Config> {
        let Compiled { known, unknown, .. } = self.compiled;
        loop {
            let (candidates, _) = self.candidates(&mut config);
            let is_read = |at: &&usize| known[**at].writes.is_empty() && known[**at].is_enabled(&config.classes);
            let Some(read) = candidates.iter().find(is_read) else { break };
            config.done.insert(*read);
        }
        loop {
            let is_new = |at: &usize| !config.gone.contains(*at) && is_dead(&unknown[*at], &config);
            // One that is dead can be the last that another waits for.
            let Some(dead) = (0..unknown.len()).find(is_new) else { break };
            config.gone.insert(dead);
        }
        let is_doomed = (config.first..known.len()).any(|at| !config.done.contains(at) && is_dead(&known[at], &config));
        (!is_doomed).then_some(config)
    }

    /// Known operations that can be next, and the first response of theirs: nothing invoked later can be next.
    fn candidates(&self, config: &mut Config) -> (Vec<usize>, u64) {
        let known = &self.compiled.known;
        while config.first < known.len() && config.done.contains(config.first) {
            config.first += 1;
        }
        let mut candidates = Vec::new();
        let mut bar = u64::MAX;
        for (at, op) in known.iter().enumerate().skip(config.first) {
            if op.invoked > bar {
                break;
            }
            if !config.done.contains(at) {
                bar = bar.min(op.returned);
                candidates.push(at);
            }
        }
        // What had to happen first is visited first.
        candidates.sort_by_key(|at| known[*at].returned);
        (candidates, bar)
    }

    /// Rule 4, dominance. Of two configurations that differ only in what is gone, everything that can follow the one with
    /// more gone can follow the one with less. So the former is visited only if no such configuration was.
    fn is_dominated(&mut self, config: &Config) -> bool {
        let visited = self.memory.entry((config.done.clone(), config.classes.clone())).or_default();
        if visited.iter().any(|gone| gone.is_subset(&config.gone)) {
            return true;
        }
        visited.retain(|gone| !config.gone.is_subset(gone));
        visited.push(config.gone.clone());
        false
    }

    /// Unknown operations that can be next. One that changes nothing here can as well never happen.
    ///
    /// Rule 5, interchangeable operations. Of those with the same effect one is enough; `is_preferred` says which, and why.
    fn unknown_candidates(&self, config: &Config, bar: u64) -> Vec<usize> {
        let unknown = &self.compiled.unknown;
        let can_be_next = |at: &usize| {
            let op = &unknown[*at];
            !config.gone.contains(*at)
                && op.invoked < bar
                && op.is_enabled(&config.classes)
                && op.changes(&config.classes)
        };
        let possible: Vec<_> = (0..unknown.len()).filter(can_be_next).collect();
        let is_best = |at: &usize| !possible.iter().any(|other| self.is_preferred(config, *other, *at));
        let mut best: Vec<_> = possible.iter().copied().filter(is_best).collect();
        best.sort_by_key(|at| config.used.contains(*at));
        best
    }

    /// Returns whether this unknown operation, rather than the other, is to be next, where both can be.
    fn is_preferred(&self, config: &Config, this: usize, other: usize) -> bool {
        let unknown = &self.compiled.unknown;
        if this == other || unknown[this].writes != unknown[other].writes {
            return false;
        }
        match (self.tracked.contains(this), self.tracked.contains(other)) {
            // With either next, all else stays possible. For a linearization of the real history: rather one not yet used.
            (false, false) => (config.used.contains(this), this) < (config.used.contains(other), other),
            // The one that can happen again leaves more possible.
            (false, true) => true,
            (true, false) => false,
            // In a linearization with the other next, this one can take its place, and the other that of this one, which is
            // later, if there is one: whatever meets the needs of this one meets those of the other. Of two with the same
            // needs, the first.
            (true, true) => {
                unknown[this].needs_all_of(&unknown[other])
                    && (this < other || !unknown[other].needs_all_of(&unknown[this]))
            }
        }
    }
}

fn is_dead(op: &Op, config: &Config) -> bool {
    op.needs.iter().any(|need| {
        !need.allows(&config.classes)
            && need.known_suppliers.is_subset(&config.done)
            && need.unknown_suppliers.is_subset(&config.gone)
    })
}
