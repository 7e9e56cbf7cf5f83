package nodestest

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"net/http"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
)

const (
	protobufType = "application/vnd.kubernetes.protobuf"
	jsonType     = "application/json"
)

// message is an object that knows its protobuf.
type message interface{ Marshal() ([]byte, error) }

// encode puts an object in its envelope.
func encode(kind string, m message) []byte {
	raw, err := m.Marshal()
	if err != nil {
		panic(err) // of an object that the test made
	}
	envelope := runtime.Unknown{TypeMeta: runtime.TypeMeta{APIVersion: "v1", Kind: kind}, Raw: raw}
	data, err := envelope.Marshal()
	if err != nil {
		panic(err)
	}
	return append([]byte("k8s\x00"), data...)
}

// frame is an event as a watch has it.
func frame(typ watch.EventType, object []byte) []byte {
	e := metav1.WatchEvent{Type: string(typ), Object: runtime.RawExtension{Raw: object}}
	data, err := e.Marshal()
	if err != nil {
		panic(err)
	}
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(data))), data...)
}

func bookmark(version int, annotations map[string]string) []byte {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{ResourceVersion: strconv.Itoa(version), Annotations: annotations}}
	return frame(watch.Bookmark, encode("Node", n))
}

func fail(w http.ResponseWriter, r *http.Request, err *apierrors.StatusError) {
	if d := err.ErrStatus.Details; d != nil && d.RetryAfterSeconds > 0 {
		w.Header().Set("Retry-After", strconv.Itoa(int(d.RetryAfterSeconds)))
	}
	status := err.Status()
	status.TypeMeta = metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}
	// Who is not let in gets JSON whatever he accepts, as of kube-apiserver.
	if accepts(r, protobufType) && status.Code != http.StatusUnauthorized {
		w.Header().Set("Content-Type", protobufType)
		w.WriteHeader(int(status.Code))
		w.Write(encode("Status", &status))
		return
	}
	w.Header().Set("Content-Type", jsonType)
	w.WriteHeader(int(status.Code))
	json.NewEncoder(w).Encode(status)
}

func accepts(r *http.Request, typ string) bool { return strings.Contains(r.Header.Get("Accept"), typ) }

// Status is a fault: every request is refused so.
func Status(err *apierrors.StatusError) Fault {
	return func(w http.ResponseWriter, r *http.Request) bool {
		fail(w, r, err)
		return true
	}
}

// Answer is a fault: every request is answered so.
func Answer(contentType, body string) Fault {
	return func(w http.ResponseWriter, _ *http.Request) bool {
		w.Header().Set("Content-Type", contentType)
		w.Write([]byte(body))
		return true
	}
}

// Stall is a fault: requests are taken, and never answered.
func Stall(_ http.ResponseWriter, r *http.Request) bool {
	<-r.Context().Done()
	return true
}

// bookmarkEvery is what kube-apiserver does.
const bookmarkEvery = time.Minute

// InternalEvent is a fault: a watch that is to begin with what there is begins, and ends with an error,
// as that of an API server whose etcd can't tell how far it is.
func InternalEvent(w http.ResponseWriter, r *http.Request) bool {
	if r.URL.Query().Get("sendInitialEvents") != "true" {
		return false
	}
	status := apierrors.NewInternalError(errors.New("RequestWatchProgress is disabled")).Status()
	w.Header().Set("Content-Type", protobufType+";stream=watch")
	w.Write(frame(watch.Error, encode("Status", &status)))
	return true
}

// watch sends what happens after a version, or first all that there is.
func (s *Server) watch(w http.ResponseWriter, r *http.Request, cut <-chan struct{}) {
	q := r.URL.Query()
	from, _ := strconv.Atoi(q.Get("resourceVersion"))
	initial := q.Get("sendInitialEvents") == "true"
	if initial {
		s.note("watch initial " + q.Get("resourceVersion"))
	} else {
		s.note("watch " + q.Get("resourceVersion"))
	}
	s.mu.Lock()
	oldest, now := s.oldest, s.version
	s.mu.Unlock()
	switch {
	case initial && s.NoInitialEvents:
		fail(w, r, apierrors.NewInvalid(metav1.SchemeGroupVersion.WithKind("ListOptions").GroupKind(), "", nil))
		return
	case initial && from > now: // any other watch is silent until there is something newer
		err := apierrors.NewTimeoutError("Too large resource version", 1)
		err.ErrStatus.Details.Causes = []metav1.StatusCause{{Type: metav1.CauseTypeResourceVersionTooLarge}}
		fail(w, r, err)
		return
	case !initial && from != 0 && from < oldest:
		fail(w, r, apierrors.NewResourceExpired("too old resource version"))
		return
	}
	seconds, err := strconv.Atoi(q.Get("timeoutSeconds"))
	if err != nil {
		seconds = 600
	}
	end, marks := time.NewTimer(time.Duration(seconds)*time.Second), time.NewTicker(bookmarkEvery)
	defer end.Stop()
	defer marks.Stop()
	w.Header().Set("Content-Type", protobufType+";stream=watch")
	w.WriteHeader(http.StatusOK)
	flush := http.NewResponseController(w)
	flush.Flush()
	if initial || from == 0 {
		from = s.sendAll(w, initial && !s.IgnoreInitialEvents)
		flush.Flush()
	}
	for {
		s.mu.Lock()
		news, expire := s.news, s.expire
		var list []event
		for i := len(s.history) - 1; i >= 0 && s.history[i].version > from; i-- {
			list = append(list, s.history[i])
		}
		s.mu.Unlock()
		for i := len(list) - 1; i >= 0; i-- {
			if _, err := w.Write(frame(list[i].typ, encode("Node", list[i].node))); err != nil {
				return
			}
			from = list[i].version
		}
		flush.Flush()
		select {
		case <-news:
		case <-marks.C:
			if head := s.head(); head > from {
				w.Write(bookmark(head, nil))
				flush.Flush()
			}
		case <-expire:
			w.Write(frame(watch.Error, encode("Status", expired())))
			return
		case <-end.C:
			return
		case <-cut:
			panic(http.ErrAbortHandler)
		case <-r.Context().Done():
			return
		}
	}
}

func (s *Server) head() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.version
}

func expired() *metav1.Status {
	status := apierrors.NewResourceExpired("too old resource version").Status()
	return &status
}

// sendAll sends all nodes as added ones, and the mark of the end.
func (s *Server) sendAll(w http.ResponseWriter, mark bool) (version int) {
	s.mu.Lock()
	list, version := s.sorted(), s.version
	s.mu.Unlock()
	for _, n := range list {
		w.Write(frame(watch.Added, encode("Node", n)))
	}
	if mark {
		w.Write(bookmark(version, map[string]string{metav1.InitialEventsAnnotationKey: "true"}))
	}
	return version
}

// CutAfter is a fault: the answers of s break off after so many bytes.
func CutAfter(s *Server, limit int) Fault {
	return func(w http.ResponseWriter, r *http.Request) bool {
		s.answer(&limited{w, limit}, r)
		return true
	}
}

type limited struct {
	http.ResponseWriter
	left int
}

func (l *limited) Write(b []byte) (int, error) {
	n, err := l.ResponseWriter.Write(b[:min(len(b), l.left)])
	if l.left -= n; l.left == 0 && err == nil {
		http.NewResponseController(l.ResponseWriter).Flush()
		panic(http.ErrAbortHandler)
	}
	return n, err
}

func (l *limited) Unwrap() http.ResponseWriter { return l.ResponseWriter }

// Forbid is a fault: a method is refused, as by RBAC.
func Forbid(method string) Fault {
	return func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method != method {
			return false
		}
		fail(w, r, apierrors.NewForbidden(eventResource, "", errors.New("no rule allows it")))
		return true
	}
}

// Before is a fault that only does something before each request of a method.
func Before(method string, do func()) Fault {
	return func(_ http.ResponseWriter, r *http.Request) bool {
		if r.Method == method {
			do()
		}
		return false
	}
}
