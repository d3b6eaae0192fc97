//! The words of the language.

use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;

/// People's names.
#[rustfmt::skip]
pub(super) const NAMES: &[&str] = &[
    "Tom", "Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Ida", "Jack", "Kate", "Leo",
    "Mary", "Nick", "Olga", "Paul", "Rosa", "Sam", "Tina", "Victor", "Wendy", "Max", "Lucy", "Peter", "Nora",
    "Oscar", "Ruth", "Simon", "Vera",
];

/// Places of a text.
#[rustfmt::skip]
pub(super) const PLACES: &[&str] = &[
    "river", "forest", "lake", "hill", "old mill", "garden", "sea", "bridge", "castle", "meadow",
];

/// Things to lose and to find.
#[rustfmt::skip]
pub(super) const THINGS: &[&str] = &[
    "key", "book", "ring", "hat", "lamp", "clock", "cup", "map", "box", "bell",
];

/// Food in a text.
#[rustfmt::skip]
pub(super) const FOODS: &[&str] = &[
    "bread", "soup", "cake", "cheese", "apples", "honey", "rice", "nuts",
];

/// Kinds of things.
pub(super) const KINDS: &[&str] = &["animal", "fruit", "vegetable", "tool", "bird", "fish"];

/// Things and their kinds.
#[rustfmt::skip]
pub(super) const NOUNS: &[(&str, &str)] = &[
    ("tiger", "animal"), ("cat", "animal"), ("dog", "animal"), ("horse", "animal"), ("cow", "animal"),
    ("fox", "animal"), ("bear", "animal"), ("lion", "animal"), ("wolf", "animal"), ("mouse", "animal"),
    ("rabbit", "animal"), ("goat", "animal"), ("camel", "animal"), ("monkey", "animal"), ("zebra", "animal"),
    ("apple", "fruit"), ("pear", "fruit"), ("lemon", "fruit"), ("plum", "fruit"), ("peach", "fruit"),
    ("orange", "fruit"), ("grape", "fruit"), ("cherry", "fruit"), ("banana", "fruit"), ("mango", "fruit"),
    ("carrot", "vegetable"), ("onion", "vegetable"), ("potato", "vegetable"), ("bean", "vegetable"),
    ("pea", "vegetable"), ("cabbage", "vegetable"), ("tomato", "vegetable"),
    ("hammer", "tool"), ("saw", "tool"), ("knife", "tool"), ("spade", "tool"), ("drill", "tool"),
    ("axe", "tool"), ("rake", "tool"), ("brush", "tool"),
    ("eagle", "bird"), ("owl", "bird"), ("duck", "bird"), ("goose", "bird"), ("crow", "bird"),
    ("swan", "bird"), ("robin", "bird"), ("parrot", "bird"),
    ("shark", "fish"), ("salmon", "fish"), ("trout", "fish"), ("tuna", "fish"), ("eel", "fish"),
    ("carp", "fish"),
];

/// Heroes of stories.
#[rustfmt::skip]
pub(super) const ANIMALS: &[&str] = &[
    "tiger", "cat", "dog", "horse", "cow", "fox", "bear", "lion", "wolf", "mouse", "rabbit", "goat", "camel",
    "monkey", "zebra", "eagle", "owl", "duck", "goose", "crow", "swan", "robin", "parrot", "robot", "king",
    "sailor", "farmer", "teacher", "dragon", "giant",
];

/// Subjects of poems, after `the`.
#[rustfmt::skip]
pub(super) const POEM_TOPICS: &[&str] = &[
    "sea", "moon", "sun", "rain", "snow", "wind", "river", "forest", "rose", "night", "lake", "hill", "bird",
    "garden", "tree", "star", "road", "candle", "winter", "spring", "clock", "bell", "cat", "owl",
];

/// Subjects of letters and dialogues.
#[rustfmt::skip]
pub(super) const SUBJECTS: &[&str] = &[
    "my garden", "my school", "my trip", "my new house", "my dog", "my work", "the summer", "the party",
    "the concert", "the football game", "my holiday", "my birthday", "the museum", "my new bike",
];

/// Dishes.
#[rustfmt::skip]
pub(super) const DISHES: &[&str] = &[
    "apple cake", "bread", "tomato soup", "rice", "pizza", "onion soup", "potato salad", "lemon cake",
    "banana bread", "cheese cake", "fish soup", "bean soup", "carrot cake", "cherry pie", "plum cake",
    "apple pie", "mushroom soup", "pear cake", "cabbage soup", "duck", "salmon", "trout", "orange cake", "peach pie",
];

/// Things that tips are asked for.
#[rustfmt::skip]
pub(super) const SKILLS: &[&str] = &[
    "learning English", "sleeping well", "cooking", "painting", "singing", "swimming", "running", "writing",
    "reading", "saving money", "playing chess", "dancing", "fishing", "sewing", "teaching", "gardening",
    "traveling", "drawing", "climbing", "baking", "working at home", "making friends", "speaking well",
    "playing the piano",
];

/// Things in nature to explain.
#[rustfmt::skip]
pub(super) const NATURE: &[&str] = &[
    "rain", "snow", "wind", "light", "sound", "heat", "fire", "ice", "water", "fog", "thunder", "gravity",
    "the moon", "the sun", "the sea", "the river", "the forest", "sleep", "sand", "salt", "air", "frost",
    "the tide", "the night",
];

/// Words to repeat, each of few tokens.
#[rustfmt::skip]
pub(super) const SHORT_WORDS: &[&str] = &[
    "cat", "dog", "fox", "bear", "apple", "rain", "snow", "yes", "no", "hello", "sun", "moon", "tree", "book",
    "key", "hat", "cake", "soup", "red", "blue", "happy", "good", "bird", "fish", "river", "star",
];

/// Sentences to copy.
#[rustfmt::skip]
pub(super) const SENTENCES: &[&str] = &[
    "I love my dog.", "The cat is old.", "It is very cold.", "We like the sun.", "The sea is blue.",
    "My house is small.", "I am so happy.", "She has a book.", "He went home.", "They play in the garden.",
    "The moon is bright.", "I will be good.", "You are my friend.", "The tree is green.", "I like bread and cheese.",
    "It was a long day.",
];

/// Days of the week.
#[rustfmt::skip]
pub(super) const DAYS: &[&str] = &[
    "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday",
];

/// Months of the year.
#[rustfmt::skip]
pub(super) const MONTHS: &[&str] = &[
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
    "November", "December",
];

/// Countries and their capitals.
#[rustfmt::skip]
pub(super) const CAPITALS: &[(&str, &str)] = &[
    ("France", "Paris"), ("Italy", "Rome"), ("Spain", "Madrid"), ("Germany", "Berlin"), ("Austria", "Vienna"),
    ("Greece", "Athens"), ("Portugal", "Lisbon"), ("Poland", "Warsaw"), ("Norway", "Oslo"),
    ("Sweden", "Stockholm"), ("Finland", "Helsinki"), ("Ireland", "Dublin"), ("England", "London"),
    ("Egypt", "Cairo"), ("Japan", "Tokyo"), ("China", "Beijing"), ("Cuba", "Havana"), ("Peru", "Lima"),
    ("Kenya", "Nairobi"), ("Canada", "Ottawa"), ("Russia", "Moscow"), ("Hungary", "Budapest"),
    ("Turkey", "Ankara"), ("Iran", "Tehran"), ("Chile", "Santiago"), ("Nepal", "Kathmandu"),
];

/// Pairs of opposites; no word is in two pairs.
#[rustfmt::skip]
pub(super) const OPPOSITES: &[(&str, &str)] = &[
    ("hot", "cold"), ("big", "small"), ("long", "short"), ("old", "young"), ("good", "bad"), ("fast", "slow"),
    ("high", "low"), ("day", "night"), ("black", "white"), ("rich", "poor"), ("happy", "sad"), ("wet", "dry"),
    ("hard", "soft"), ("full", "empty"), ("open", "closed"), ("light", "dark"), ("strong", "weak"),
    ("early", "late"), ("left", "right"), ("up", "down"), ("in", "out"), ("first", "last"), ("near", "far"),
    ("true", "false"), ("clean", "dirty"), ("loud", "quiet"),
];

/// A thing and its kind.
pub(super) fn noun(rng: &mut ChaCha8Rng) -> (&'static str, &'static str) {
    NOUNS.choose(rng).copied().unwrap_or_default()
}
