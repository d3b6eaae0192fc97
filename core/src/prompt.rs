//! What a model is asked, before any chat template.

use serde::{Deserialize, Serialize};

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChatMessage {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// The text of the turn.
    pub content: String,
}

impl ChatMessage {
    /// A turn of the user.
    pub fn user(content: impl Into<String>) -> Self {
        Self {
            role: "user".to_owned(),
            content: content.into(),
        }
    }

    /// A turn of the model.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self {
            role: "assistant".to_owned(),
            content: content.into(),
        }
    }
}

/// What a model is asked. The model's chat template turns it into text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prompt {
    /// A single instruction: one turn of the user.
    Instruction(String),
    /// A conversation whose next turn is the assistant's.
    Chat(Vec<ChatMessage>),
}

impl Prompt {
    /// The prompt as turns of a conversation.
    pub fn messages(&self) -> Vec<ChatMessage> {
        match self {
            Self::Instruction(text) => vec![ChatMessage::user(text.clone())],
            Self::Chat(messages) => messages.clone(),
        }
    }

    /// The same prompt with `suffix` after the last turn of the user; the length questions are put this way.
    /// A conversation without such a turn gets one.
    pub fn with_suffix(&self, suffix: &str) -> Self {
        match self {
            Self::Instruction(text) => Self::Instruction(format!("{text}{suffix}")),
            Self::Chat(messages) => {
                let mut messages = messages.clone();
                match messages.iter_mut().rev().find(|m| m.role == "user") {
                    Some(last) => last.content.push_str(suffix),
                    None => messages.push(ChatMessage::user(suffix.trim_start())),
                }
                Self::Chat(messages)
            }
        }
    }

    /// Whether there is no text in it at all.
    pub fn is_blank(&self) -> bool {
        match self {
            Self::Instruction(text) => text.trim().is_empty(),
            Self::Chat(messages) => messages.iter().all(|m| m.content.trim().is_empty()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suffix_goes_to_the_last_user_turn() {
        let chat = Prompt::Chat(vec![
            ChatMessage::user("a"),
            ChatMessage::assistant("b"),
            ChatMessage::user("c"),
        ]);
        let Prompt::Chat(got) = chat.with_suffix("!") else {
            panic!("a chat stays a chat");
        };
        assert_eq!(got[0].content, "a");
        assert_eq!(got[2].content, "c!");
    }

    #[test]
    fn blank_is_white_space_only() {
        assert!(Prompt::Instruction(" \n".into()).is_blank());
        assert!(!Prompt::Instruction("x".into()).is_blank());
    }
}
