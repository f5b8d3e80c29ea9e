//! Agreed by both sides.
