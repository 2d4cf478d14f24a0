package main

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

// Most lines a second with one message; whoever floods us must not flood the log as well. What was left
// out is counted on the next line with that message.
const (
	logBurst       = 20
	maxLogMessages = 1000 // kept apart; messages are constants, so there are fewer
)

// limitedLog passes at most logBurst records of one level and message on in each second.
type limitedLog struct {
	next  slog.Handler
	state *logCounts // shared by all handlers derived from one
}

type logCounts struct {
	mu    sync.Mutex
	count map[logKey]*logCount
}

type logKey struct {
	level   slog.Level
	message string
}

type logCount struct {
	second  time.Time
	passed  int
	skipped int
}

func limitLog(next slog.Handler) slog.Handler {
	return &limitedLog{next, &logCounts{count: map[logKey]*logCount{}}}
}

func (l *limitedLog) Enabled(ctx context.Context, level slog.Level) bool {
	return l.next.Enabled(ctx, level)
}

func (l *limitedLog) Handle(ctx context.Context, r slog.Record) error {
	pass, skipped := l.state.admit(r)
	if !pass {
		return nil
	}
	if skipped > 0 {
		r = r.Clone()
		r.AddAttrs(slog.Int("left_out", skipped))
	}
	return l.next.Handle(ctx, r)
}

func (s *logCounts) admit(r slog.Record) (pass bool, skipped int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	key := logKey{r.Level, r.Message}
	c := s.count[key]
	if c == nil {
		if len(s.count) >= maxLogMessages {
			clear(s.count)
		}
		c = &logCount{second: r.Time}
		s.count[key] = c
	}
	// A clock that was set back starts a new second as well.
	if age := r.Time.Sub(c.second); age >= time.Second || age < 0 {
		c.second, c.passed = r.Time, 0
	}
	if c.passed >= logBurst {
		c.skipped++
		return false, 0
	}
	c.passed++
	skipped, c.skipped = c.skipped, 0
	return true, skipped
}

func (l *limitedLog) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &limitedLog{l.next.WithAttrs(attrs), l.state}
}

func (l *limitedLog) WithGroup(name string) slog.Handler {
	return &limitedLog{l.next.WithGroup(name), l.state}
}
