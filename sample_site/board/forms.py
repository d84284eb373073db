"""The form of the board."""

from __future__ import annotations

from typing import TYPE_CHECKING

from django import forms

from .models import Message

if TYPE_CHECKING:
    _MessageForm = forms.ModelForm[Message]
else:
    _MessageForm = forms.ModelForm


class MessageForm(_MessageForm):
    """A new message."""

    text = forms.CharField(
        label="Your message",
        max_length=280,
        widget=forms.TextInput(attrs={"placeholder": "Say something", "autocomplete": "off"}),
    )

    class Meta:
        model = Message
        fields = ("text",)
