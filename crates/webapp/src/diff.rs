//! Computes the deltas that turn the tree on the page into the tree that a run built. Nodes that stay keep their ids.

use crate::tree::{Element, Node, Prop, Props};
use std::collections::HashMap;
use wire::app::{AppendText, Delta, Insert, Move, Op, Remove, Update};

/// Assigns ids to the nodes of one session. The root has id 0.
#[derive(Debug, Default)]
pub struct Ids(u64);

impl Ids {
    fn next(&mut self) -> u64 {
        self.0 += 1;
        self.0
    }
}

/// Creates a tree of new nodes from elements.
pub fn adopt(elements: Vec<Element>, ids: &mut Ids) -> Vec<Node> {
    elements.into_iter().map(|element| adopt_one(element, ids)).collect()
}

fn adopt_one(element: Element, ids: &mut Ids) -> Node {
    Node {
        id: ids.next(),
        kind: element.kind,
        key: element.key,
        widget: element.widget,
        props: element.props,
        children: adopt(element.children, ids),
    }
}

/// Returns the new tree, and the deltas that turn the old one into it when applied in order.
pub fn diff(old: Vec<Node>, new: Vec<Element>, ids: &mut Ids) -> (Vec<Node>, Vec<Delta>) {
    let mut deltas = Vec::new();
    let nodes = children(0, old, new, ids, &mut deltas);
    (nodes, deltas)
}

/// Returns what identifies each sibling across runs: kind, key and widget, with a count for those that share all three.
fn identities<'a, T>(
    siblings: &'a [T],
    of: impl Fn(&'a T) -> (&'static str, &'a str, &'a str),
) -> Vec<(&'static str, &'a str, &'a str, usize)> {
    let mut seen: HashMap<(&str, &str, &str), usize> = HashMap::new();
    let count = |sibling| {
        let (kind, key, widget) = of(sibling);
        let nth = seen.entry((kind, key, widget)).or_default();
        *nth += 1;
        (kind, key, widget, *nth)
    };
    siblings.iter().map(count).collect()
}

fn children(parent: u64, old: Vec<Node>, new: Vec<Element>, ids: &mut Ids, deltas: &mut Vec<Delta>) -> Vec<Node> {
    // The index of the old sibling that each new one continues.
    let matched: Vec<Option<usize>> = {
        let known = identities(&old, |node| (node.kind, &node.key, &node.widget));
        let known: HashMap<_, _> = known
            .into_iter()
            .enumerate()
            .map(|(i, identity)| (identity, i))
            .collect();
        let wanted = identities(&new, |element| (element.kind, &element.key, &element.widget));
        wanted
            .into_iter()
            .map(|identity| known.get(&identity).copied())
            .collect()
    };

    let mut kept = vec![false; old.len()];
    matched.iter().flatten().for_each(|&i| kept[i] = true);
    // The ids of the children on the page once the deltas so far are applied.
    let mut shown = Vec::with_capacity(new.len());
    for (node, kept) in old.iter().zip(kept) {
        if kept {
            shown.push(node.id);
        } else {
            deltas.push(op(Op::Remove(Remove { id: node.id })));
        }
    }

    let stays = longest_increasing(&matched);
    let mut old: Vec<Option<Node>> = old.into_iter().map(Some).collect();
    let mut nodes: Vec<Node> = Vec::with_capacity(new.len());
    for (i, (element, from)) in new.into_iter().zip(matched).enumerate() {
        // The index after the previous sibling, in the list as the page has it at this point.
        let after = |shown: &[u64], nodes: &[Node]| match nodes.last() {
            None => 0,
            Some(before) => 1 + position(shown, before.id),
        };
        match from.and_then(|from| old[from].take()) {
            Some(node) => {
                if !stays[i] {
                    // The index of a move does not count the moved node, so take it out first.
                    shown.remove(position(&shown, node.id));
                    let index = after(&shown, &nodes);
                    shown.insert(index, node.id);
                    deltas.push(op(Op::Move(Move { id: node.id, parent, index: to_u32(index) })));
                }
                props(node.id, &node.props, &element.props, deltas);
                let children = children(node.id, node.children, element.children, ids, deltas);
                nodes.push(Node { props: element.props, children, ..node });
            }
            None => {
                let node = adopt_one(element, ids);
                let index = after(&shown, &nodes);
                shown.insert(index, node.id);
                let insert = Insert { parent, index: to_u32(index), node: Some(node.to_wire()) };
                deltas.push(op(Op::Insert(insert)));
                nodes.push(node);
            }
        }
    }
    nodes
}

fn props(id: u64, old: &Props, new: &Props, deltas: &mut Vec<Delta>) {
    let mut set = Vec::new();
    for (name, value) in new {
        match (old.iter().find(|(known, _)| known == name), value) {
            (Some((_, before)), _) if before == value => {}
            // Text that grows, such as a log, is sent as the part that was added.
            (Some((_, Prop::Text(before))), Prop::Text(now))
                if !before.is_empty() && now.starts_with(before.as_str()) =>
            {
                let text = now[before.len()..].to_string();
                deltas.push(op(Op::AppendText(AppendText { id, prop: (*name).into(), text })));
            }
            _ => set.push(value.to_wire(name)),
        }
    }

    let gone = old
        .iter()
        .filter(|(name, _)| !new.iter().any(|(known, _)| known == name));
    let unset: Vec<String> = gone.map(|(name, _)| (*name).to_string()).collect();
    if !set.is_empty() || !unset.is_empty() {
        deltas.push(op(Op::Update(Update { id, set, unset })));
    }
}

/// Marks the matched siblings that need not move: a longest subsequence whose old places ascend.
fn longest_increasing(places: &[Option<usize>]) -> Vec<bool> {
    // `tails[n]` is the index where the best subsequence of length n + 1 ends; `before` links to the previous member.
    let mut tails: Vec<usize> = Vec::new();
    let mut before = vec![None; places.len()];
    for (i, place) in places.iter().enumerate() {
        let Some(place) = place else { continue };
        let length = tails.partition_point(|&tail| places[tail] < Some(*place));
        before[i] = length.checked_sub(1).map(|shorter| tails[shorter]);
        if length == tails.len() {
            tails.push(i);
        } else {
            tails[length] = i;
        }
    }

    let mut stays = vec![false; places.len()];
    let mut at = tails.last().copied();
    while let Some(i) = at {
        stays[i] = true;
        at = before[i];
    }
    stays
}

fn position(shown: &[u64], id: u64) -> usize {
    shown
        .iter()
        .position(|&other| other == id)
        .expect("a node that was placed is on the page")
}

fn op(op: Op) -> Delta {
    Delta { op: Some(op) }
}

fn to_u32(index: usize) -> u32 {
    u32::try_from(index).expect("a tree has far fewer nodes")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use wire::app;

    /// A minimal model of the page.
    #[derive(Debug, PartialEq, Clone)]
    struct Page(app::Node);

    impl Page {
        fn of(nodes: &[Node]) -> Self {
            Self(app::Node {
                children: nodes.iter().map(Node::to_wire).collect(),
                ..app::Node::default()
            })
        }

        fn apply(&mut self, deltas: &[Delta]) {
            for delta in deltas {
                match delta.op.clone().unwrap() {
                    Op::Insert(insert) => {
                        let parent = Self::get(&mut self.0, insert.parent).unwrap();
                        parent.children.insert(insert.index as usize, insert.node.unwrap());
                    }
                    Op::Remove(remove) => drop(Self::take(&mut self.0, remove.id).unwrap()),
                    Op::Move(step) => {
                        let node = Self::take(&mut self.0, step.id).unwrap();
                        Self::get(&mut self.0, step.parent)
                            .unwrap()
                            .children
                            .insert(step.index as usize, node);
                    }
                    Op::Update(update) => {
                        let node = Self::get(&mut self.0, update.id).unwrap();
                        node.props.retain(|prop| !update.unset.contains(&prop.name));
                        for prop in update.set {
                            node.props.retain(|known| known.name != prop.name);
                            node.props.push(prop);
                        }
                    }
                    Op::AppendText(append) => {
                        let node = Self::get(&mut self.0, append.id).unwrap();
                        let prop = node.props.iter_mut().find(|prop| prop.name == append.prop).unwrap();
                        let Some(app::Value::Text(text)) = &mut prop.value else {
                            panic!("not a text")
                        };
                        text.push_str(&append.text);
                    }
                    Op::Reset(_) => panic!("a diff never resets"),
                }
            }
        }

        fn get(node: &mut app::Node, id: u64) -> Option<&mut app::Node> {
            if node.id == id {
                return Some(node);
            }
            node.children.iter_mut().find_map(|child| Self::get(child, id))
        }

        fn take(node: &mut app::Node, id: u64) -> Option<app::Node> {
            if let Some(i) = node.children.iter().position(|child| child.id == id) {
                return Some(node.children.remove(i));
            }
            node.children.iter_mut().find_map(|child| Self::take(child, id))
        }

        fn sorted(mut self) -> Self {
            fn sort(node: &mut app::Node) {
                node.props.sort_by(|a, b| a.name.cmp(&b.name));
                node.children.iter_mut().for_each(sort);
            }
            sort(&mut self.0);
            self
        }
    }

    fn trees() -> impl Strategy<Value = Vec<Element>> {
        let kind = prop::sample::select(vec!["text", "card", "table"]);
        let key = prop::sample::select(vec!["", "a", "b", "c", "d"]);
        let value = prop_oneof![
            "[ab]{0,3}".prop_map(Prop::Text),
            (0..3u8).prop_map(|n| Prop::Number(f64::from(n))),
            any::<bool>().prop_map(Prop::Flag),
        ];
        let names = prop::sample::subsequence(vec!["x", "y", "z"], 0..=3);
        let props = (names, prop::collection::vec(value, 3))
            .prop_map(|(names, values)| names.into_iter().zip(values).collect());

        let leaf = (kind, key, props).prop_map(|(kind, key, props): (_, _, Props)| Element {
            kind,
            key: key.into(),
            widget: String::new(),
            props,
            children: Vec::new(),
        });
        let element = leaf.prop_recursive(3, 40, 6, |inner| {
            (inner.clone(), prop::collection::vec(inner, 0..6)).prop_map(|(mut element, children)| {
                element.children = children;
                element
            })
        });
        prop::collection::vec(element, 0..7)
    }

    fn same_shape(node: &Node, element: &Element) -> bool {
        node.kind == element.kind
            && node.key == element.key
            && node.props == element.props
            && node.children.len() == element.children.len()
            && node
                .children
                .iter()
                .zip(&element.children)
                .all(|(node, element)| same_shape(node, element))
    }

    proptest! {
        #[test]
        fn deltas_turn_the_old_tree_into_the_new_one(runs in prop::collection::vec(trees(), 2..5)) {
            let mut ids = Ids::default();
            let mut runs = runs.into_iter();
            let mut nodes = adopt(runs.next().unwrap(), &mut ids);
            let mut page = Page::of(&nodes);
            for run in runs {
                let (next, deltas) = diff(nodes, run.clone(), &mut ids);
                page.apply(&deltas);
                prop_assert_eq!(page.clone().sorted(), Page::of(&next).sorted());
                prop_assert!(next.iter().zip(&run).all(|(node, element)| same_shape(node, element)));
                prop_assert_eq!(next.len(), run.len());
                nodes = next;
            }
        }

        #[test]
        fn unchanged_tree_has_no_deltas(tree in trees()) {
            let mut ids = Ids::default();
            let nodes = adopt(tree.clone(), &mut ids);
            prop_assert_eq!(diff(nodes, tree, &mut ids).1, Vec::new());
        }
    }

    fn keyed(keys: &[&str]) -> Vec<Element> {
        keys.iter()
            .map(|key| Element { key: (*key).into(), ..Element::new("card") })
            .collect()
    }

    #[test]
    fn only_moved_nodes_are_moved() {
        let mut ids = Ids::default();
        let nodes = adopt(keyed(&["a", "b", "c", "d", "e"]), &mut ids);
        let (nodes, deltas) = diff(nodes, keyed(&["e", "a", "b", "c", "d"]), &mut ids);
        assert_eq!(deltas, [op(Op::Move(Move { id: 5, parent: 0, index: 0 }))]);
        let (_, deltas) = diff(nodes, keyed(&["a", "b", "c", "d"]), &mut ids);
        assert_eq!(deltas, [op(Op::Remove(Remove { id: 5 }))]);
    }

    #[test]
    fn grown_text_is_appended() {
        let mut ids = Ids::default();
        let nodes = adopt(vec![Element::new("text").text("text", "Hel")], &mut ids);
        let (_, deltas) = diff(nodes, vec![Element::new("text").text("text", "Hello")], &mut ids);
        assert_eq!(deltas, [op(Op::AppendText(AppendText { id: 1, prop: "text".into(), text: "lo".into() }))]);
    }
}
