//! A history in the form that `search` works on: operations with what they need of each key and what they write, and
//! values reduced to classes.

use std::collections::{BTreeMap, HashMap};
use std::ptr;

use super::history::{Item, Key, Operation, Outcome, Step};

/// Values of a key that no operation of the history can distinguish, by number.
///
/// Sound since operations depend on values only by their tests: histories stay the same when values of one class are
/// exchanged. What nobody has seen is one class, so that unknown operations that write it have the same effect.
type Class = usize;

/// The class of each key.
pub type Classes = Vec<Class>;

/// A set of small numbers.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Bits(Vec<u64>);

impl Bits {
    /// An empty set of numbers below this one.
    pub fn new(end: usize) -> Self {
        Self(vec![0; end.div_ceil(64)])
    }

    pub fn contains(&self, at: usize) -> bool {
        self.0[at / 64] >> (at % 64) & 1 == 1
    }

    pub fn insert(&mut self, at: usize) {
        self.0[at / 64] |= 1 << (at % 64);
    }

    pub fn len(&self) -> usize {
        self.0.iter().map(|word| word.count_ones() as usize).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|word| *word == 0)
    }

    pub fn is_subset(&self, other: &Self) -> bool {
        self.0.iter().zip(&other.0).all(|(word, other)| word & !other == 0)
    }

    pub fn iter(&self) -> impl Iterator<Item = usize> {
        (0..self.0.len() * 64).filter(|at| self.contains(*at))
    }
}

/// A condition on the value of a key.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Test {
    /// The value seen, or none.
    Seen(Option<Item>),
    /// A check that passed.
    HasTag(Option<u64>),
    /// A check that failed.
    HasNotTag(Option<u64>),
    /// A check of the value that passed.
    HasValue(u64),
    /// A check of the value that failed.
    HasNotValue(u64),
    Exists(bool),
}

impl Test {
    fn accepts(self, item: Option<Item>) -> bool {
        let tag = item.map(|item| item.tag);
        match self {
            Self::Seen(seen) => item == seen,
            Self::HasTag(wanted) => tag == wanted,
            Self::HasNotTag(wanted) => tag != wanted,
            Self::HasValue(wanted) => item.is_some_and(|item| item.value == wanted),
            Self::HasNotValue(wanted) => item.is_none_or(|item| item.value != wanted),
            Self::Exists(exists) => item.is_some() == exists,
        }
    }
}

/// The condition of an operation on a key before it.
pub struct Need {
    key: Key,
    /// By class.
    allowed: Vec<bool>,
    /// Other operations that bring it about, and can happen before this one.
    pub known_suppliers: Bits,
    pub unknown_suppliers: Bits,
}

impl Need {
    pub fn allows(&self, classes: &Classes) -> bool {
        self.allowed[classes[self.key]]
    }

    fn implies(&self, other: &Self) -> bool {
        self.key == other.key && self.allowed.iter().zip(&other.allowed).all(|(allowed, other)| !allowed || *other)
    }
}

/// An operation.
pub struct Op {
    pub invoked: u64,
    /// For an unknown one: never.
    pub returned: u64,
    pub needs: Vec<Need>,
    pub writes: Vec<(Key, Class)>,
}

impl Op {
    pub fn is_enabled(&self, classes: &Classes) -> bool {
        self.needs.iter().all(|need| need.allows(classes))
    }

    pub fn changes(&self, classes: &Classes) -> bool {
        self.writes.iter().any(|(key, class)| classes[*key] != *class)
    }

    pub fn apply(&self, classes: &mut Classes) {
        for (key, class) in &self.writes {
            classes[*key] = *class;
        }
    }

    /// Returns whether the other operation is enabled whenever this one is.
    pub fn needs_all_of(&self, other: &Self) -> bool {
        other.needs.iter().all(|other| self.needs.iter().any(|need| need.implies(other)))
    }
}

pub struct Compiled {
    keys: usize,
    /// Both by invocation.
    pub known: Vec<Op>,
    pub unknown: Vec<Op>,
}

impl Compiled {
    /// None for a history with an operation that contradicts itself.
    pub fn new(history: &[Operation]) -> Option<Self> {
        let mut known = Vec::new();
        let mut unknown = Vec::new();
        for operation in history {
            match (Parsed::new(operation), operation.is_unknown()) {
                (Some(parsed), false) => known.push(parsed),
                (None, false) => return None,
                (Some(parsed), true) => unknown.push(parsed),
                // It never happened.
                (None, true) => {}
            }
        }
        known.sort_by_key(|parsed| parsed.operation.invoked);
        unknown.sort_by_key(|parsed| parsed.operation.invoked);
        let keys = history.iter().flat_map(Operation::keys).max().map_or(0, |key| key + 1);
        let table: Vec<_> = (0..keys).map(|key| Table::new(key, known.iter().chain(&unknown))).collect();
        let compile = |all: &[Parsed]| all.iter().map(|parsed| parsed.compile(&table, &known, &unknown)).collect();
        Some(Self { keys, known: compile(&known), unknown: compile(&unknown) })
    }

    /// The class of the absent value, for each key.
    pub fn initial(&self) -> Classes {
        vec![0; self.keys]
    }

    /// Unknown operations that must have happened, since a known one needs them and no others.
    pub fn sole_suppliers(&self) -> Bits {
        let mut found = Bits::new(self.unknown.len());
        for need in self.known.iter().flat_map(|op| &op.needs).filter(|need| need.known_suppliers.is_empty()) {
            let mut suppliers = need.unknown_suppliers.iter();
            if let (Some(only), None) = (suppliers.next(), suppliers.next())
                && !need.allowed[0]
            {
                found.insert(only);
            }
        }
        found
    }
}

/// An operation, with its steps reduced to conditions on the keys before it and values of them after it.
struct Parsed<'h> {
    operation: &'h Operation,
    tests: BTreeMap<Key, Vec<Test>>,
    writes: BTreeMap<Key, Option<Item>>,
}

impl<'h> Parsed<'h> {
    /// None for an operation that cannot happen, whatever the store holds.
    fn new(operation: &'h Operation) -> Option<Self> {
        let mut tests = BTreeMap::<_, Vec<_>>::new();
        let mut writes = BTreeMap::new();
        for (at, step) in operation.steps.iter().enumerate() {
            let fails = operation.outcome == Outcome::Failed(at);
            let test = match *step {
                Step::Check(_, tag) if fails => Test::HasNotTag(tag),
                Step::Check(_, tag) => Test::HasTag(tag),
                Step::Compare(_, value) if fails => Test::HasNotValue(value),
                Step::Compare(_, value) => Test::HasValue(value),
                Step::Found(_, Some(exists)) if operation.outcome == Outcome::Done => Test::Exists(exists),
                Step::Found(..) => continue,
                Step::Get(_, seen) if operation.outcome == Outcome::Done => Test::Seen(seen),
                Step::Get(..) => continue,
                Step::Put(key, item) => {
                    writes.insert(key, Some(item));
                    continue;
                }
                Step::Delete(key) => {
                    writes.insert(key, None);
                    continue;
                }
            };
            // A step after a write of the same operation depends on nothing before the operation.
            match writes.get(&step.key()) {
                Some(item) if test.accepts(*item) => {}
                Some(_) => return None,
                None => tests.entry(step.key()).or_default().push(test),
            }
            if fails {
                return Some(Self { operation, tests, writes: BTreeMap::new() });
            }
        }
        let failed = matches!(operation.outcome, Outcome::Failed(_));
        (!failed).then_some(Self { operation, tests, writes })
    }

    fn compile(&self, table: &[Table], known: &[Parsed], unknown: &[Parsed]) -> Op {
        let returned = if self.operation.is_unknown() { u64::MAX } else { self.operation.returned };
        let needs = self.tests.iter().map(|(&key, tests)| {
            let allowed = table[key].allowed(tests);
            let suppliers = |all: &[Parsed]| {
                let mut suppliers = Bits::new(all.len());
                for (at, other) in all.iter().enumerate() {
                    let in_time = other.operation.invoked < returned && !ptr::eq(other.operation, self.operation);
                    if in_time && other.writes.get(&key).is_some_and(|item| allowed[table[key].class_of(*item)]) {
                        suppliers.insert(at);
                    }
                }
                suppliers
            };
            Need { key, known_suppliers: suppliers(known), unknown_suppliers: suppliers(unknown), allowed }
        });
        let writes = self.writes.iter().map(|(key, item)| (*key, table[*key].class_of(*item)));
        Op { invoked: self.operation.invoked, returned, needs: needs.collect(), writes: writes.collect() }
    }
}

/// The classes of the values of a key.
struct Table {
    class_of: HashMap<Option<Item>, Class>,
    /// A value of each class.
    samples: Vec<Option<Item>>,
}

impl Table {
    fn new<'p>(key: Key, operations: impl Iterator<Item = &'p Parsed<'p>>) -> Self {
        let mut tests = Vec::new();
        // The absent value comes first, and has class 0.
        let mut items = vec![None];
        for parsed in operations {
            tests.extend(parsed.tests.get(&key).into_iter().flatten());
            items.extend(parsed.writes.get(&key));
        }
        let mut table = Self { class_of: HashMap::new(), samples: Vec::new() };
        let mut class_by_results = HashMap::new();
        for item in items {
            let results: Vec<_> = tests.iter().map(|test: &Test| test.accepts(item)).collect();
            let class = *class_by_results.entry(results).or_insert(table.samples.len());
            if class == table.samples.len() {
                table.samples.push(item);
            }
            table.class_of.insert(item, class);
        }
        table
    }

    fn class_of(&self, item: Option<Item>) -> Class {
        self.class_of[&item]
    }

    fn allowed(&self, tests: &[Test]) -> Vec<bool> {
        self.samples.iter().map(|item| tests.iter().all(|test| test.accepts(*item))).collect()
    }
}
