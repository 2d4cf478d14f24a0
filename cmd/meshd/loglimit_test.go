package main

import (
	"bytes"
	"context"
	"log/slog"
	"strings"
	"testing"
	"time"
)

func TestLogIsLimited(t *testing.T) {
	var b bytes.Buffer
	h := limitLog(slog.NewTextHandler(&b, nil)).WithAttrs([]slog.Attr{slog.String("room", "x")})
	start := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	say := func(at time.Duration, message string) {
		if err := h.Handle(context.Background(), slog.NewRecord(start.Add(at), slog.LevelWarn, message, 0)); err != nil {
			t.Fatal(err)
		}
	}
	for range 1000 {
		say(0, "flood")
	}
	say(0, "other")
	say(time.Second, "flood")
	say(time.Second, "flood")
	say(-time.Hour, "flood")
	text := b.String()
	if n := strings.Count(text, "msg=flood"); n != logBurst+3 {
		t.Errorf("got %d lines of a flood, want %d", n, logBurst+3)
	}
	if n := strings.Count(text, "left_out=980"); n != 1 {
		t.Errorf("got %d lines that tell what was left out, want 1:\n%s", n, text)
	}
	if !strings.Contains(text, "msg=other") {
		t.Error("another message was left out")
	}
}
