package agent

import (
	"container/list"
	"net"
	"sync"
)

// crowd is a listener that holds so many connections at most. For one more it closes the
// oldest: who opens many and says nothing must not keep the next health check out.
type crowd struct {
	net.Listener
	most int

	mu   sync.Mutex
	open *list.List // of net.Conn, the oldest first
}

func newCrowd(l net.Listener, most int) *crowd {
	return &crowd{Listener: l, most: most, open: list.New()}
}

// Accept implements net.Listener.
func (c *crowd) Accept() (net.Conn, error) {
	conn, err := c.Listener.Accept()
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.open.Len() >= c.most {
		oldest := c.open.Front()
		c.open.Remove(oldest).(net.Conn).Close()
	}
	return &member{Conn: conn, crowd: c, place: c.open.PushBack(conn)}, nil
}

// member leaves the crowd when it is closed.
type member struct {
	net.Conn
	crowd *crowd
	place *list.Element
}

// Close implements net.Conn.
func (m *member) Close() error {
	m.crowd.mu.Lock()
	m.crowd.open.Remove(m.place) // nothing if it has gone already
	m.crowd.mu.Unlock()
	return m.Conn.Close()
}
