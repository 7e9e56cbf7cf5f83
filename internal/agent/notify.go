package agent

import (
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// systemd speaks the protocol of sd_notify(3): datagrams of KEY=VALUE lines. By
// hand, since it is a dozen lines, and a library would be a dependency with an
// environment of its own to read. The zero value is a process without systemd.
type systemd struct {
	conn     net.Conn
	watchdog time.Duration // how often to say that we are alive; zero: not asked for
	told     bool          // that we are ready
}

// newSystemd reads what systemd asks for from the environment. A socket that
// can't be reached is no reason not to run.
func newSystemd(getenv func(string) string) *systemd {
	path := getenv("NOTIFY_SOCKET")
	if path == "" {
		return &systemd{}
	}
	// A leading @ is an abstract socket to package net as it is to systemd.
	conn, err := net.Dial("unixgram", path)
	if err != nil {
		return &systemd{}
	}
	s := &systemd{conn: conn}
	pid := getenv("WATCHDOG_PID")
	usec, err := strconv.ParseInt(getenv("WATCHDOG_USEC"), 10, 64)
	if err == nil && usec > 0 && (pid == "" || pid == strconv.Itoa(os.Getpid())) {
		s.watchdog = time.Duration(usec) * time.Microsecond / 2 // sd_watchdog_enabled(3): half of it
	}
	return s
}

// send drops what can't be sent: systemd notices missing messages by itself.
func (s *systemd) send(lines ...string) {
	if s.conn != nil {
		s.conn.Write([]byte(strings.Join(lines, "\n")))
	}
}

// ready ends the start of the unit, once.
func (s *systemd) ready() {
	if !s.told {
		s.told = true
		s.send("READY=1")
	}
}

func (s *systemd) stopping() { s.send("STOPPING=1") }
func (s *systemd) alive()    { s.send("WATCHDOG=1") }

// status is the line that `systemctl status` shows.
func (s *systemd) status(text string) { s.send("STATUS=" + strings.ReplaceAll(text, "\n", " ")) }

// reloading must carry the time (Type=notify-reload); reloaded ends it. While the
// unit starts there is nothing to tell.
func (s *systemd) reloading() {
	if !s.told {
		return
	}
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return
	}
	s.send("RELOADING=1", fmt.Sprintf("MONOTONIC_USEC=%d", now.Nano()/1000))
}

func (s *systemd) reloaded() {
	if s.told {
		s.send("READY=1")
	}
}

func (s *systemd) close() {
	if s.conn != nil {
		s.conn.Close()
	}
}
