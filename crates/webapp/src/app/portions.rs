//! Splits the deltas of a run into portions that fit a publication each.

use crate::tree::Node;
use prost::Message as _;
use std::collections::VecDeque;
use wire::app::{Delta, Insert, Node as WireNode, Op, Reset};

/// About this many bytes of deltas go into one publication.
const PORTION_MAX: usize = 256 * 1024;

/// The delta that replaces the tree that the page holds.
pub fn whole_tree(nodes: &[Node]) -> Vec<Delta> {
    let children = nodes.iter().map(Node::to_wire).collect();
    vec![Delta { op: Some(Op::Reset(Reset { children, title: String::new() })) }]
}

/// Groups deltas in order. A delta that exceeds the limit alone is replaced by its node without children, followed by
/// an insert for each child. A node without children stays whole, however large it is.
pub fn portions(deltas: Vec<Delta>) -> Vec<Vec<Delta>> {
    let mut portions = Vec::new();
    let mut portion = Vec::new();
    let mut size = 0;

    let mut rest: VecDeque<Delta> = deltas.into();
    while let Some(delta) = rest.pop_front() {
        let length = delta.encoded_len();
        if length > PORTION_MAX
            && let Some(smaller) = split(&delta)
        {
            // The children may be too large as well, so they go through the loop again.
            smaller.into_iter().rev().for_each(|delta| rest.push_front(delta));
            continue;
        }

        if size + length > PORTION_MAX && !portion.is_empty() {
            portions.push(std::mem::take(&mut portion));
            size = 0;
        }
        size += length;
        portion.push(delta);
    }

    if !portion.is_empty() {
        portions.push(portion);
    }
    portions
}

/// Separates the children of an inserted node, or of the root, from it. `None` if there are no children.
fn split(delta: &Delta) -> Option<Vec<Delta>> {
    let (first, children) = match delta.op.as_ref()? {
        Op::Reset(reset) => {
            let bare = Reset { children: Vec::new(), title: reset.title.clone() };
            (Op::Reset(bare), inserts(0, &reset.children))
        }
        Op::Insert(insert) => {
            let node = insert.node.as_ref()?;
            let bare = WireNode { children: Vec::new(), ..node.clone() };
            let children = inserts(node.id, &node.children);
            (Op::Insert(Insert { node: Some(bare), ..insert.clone() }), children)
        }
        _ => return None,
    };

    if children.is_empty() {
        return None;
    }
    Some(std::iter::once(Delta { op: Some(first) }).chain(children).collect())
}

fn inserts(parent: u64, children: &[WireNode]) -> Vec<Delta> {
    let insert = |(index, node): (usize, &WireNode)| Insert {
        parent,
        index: u32::try_from(index).unwrap_or(u32::MAX),
        node: Some(node.clone()),
    };
    children
        .iter()
        .enumerate()
        .map(insert)
        .map(|insert| Delta { op: Some(Op::Insert(insert)) })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diff::{Ids, adopt};
    use crate::tree::Element;
    use wire::app::Deltas;

    #[test]
    fn large_tree_is_split_without_losing_a_node() {
        let leaf = |i: usize| Element::new("text").text("text", format!("{i}").repeat(3000));
        let card = |i: usize| Element {
            children: (0..40).map(leaf).collect(),
            ..Element::new("card").number("n", i as f64)
        };
        let nodes = adopt((0..30).map(card).collect(), &mut Ids::default());

        let portions = portions(whole_tree(&nodes));
        assert!(portions.len() > 10);
        let fits = |portion: &Vec<Delta>| Deltas { delta: portion.clone() }.encoded_len() <= PORTION_MAX + 1024;
        assert!(portions.iter().all(fits));

        let count = |delta: &Delta| match delta.op.as_ref().unwrap() {
            Op::Reset(reset) => reset.children.iter().map(|node| 1 + node.children.len()).sum::<usize>(),
            Op::Insert(insert) => 1 + insert.node.as_ref().unwrap().children.len(),
            _ => 0,
        };
        assert_eq!(portions.iter().flatten().map(count).sum::<usize>(), 30 * 41);
    }
}
